"""One small module of every kind that people train with Lightning.

A kind is a plain class with no Lightning base (``Task``); ``build`` puts it on the LightningModule of either
namespace. Each records its losses in ``losses``, so that two runs can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch import Tensor, nn

from .batches import Graph, Row, TensorMapping, generator, loader

NUM_BATCHES = 3


class Task:
    """What all kinds share; it is mixed into a LightningModule by ``build``."""

    automatic = True

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        if not self.automatic:
            self.automatic_optimization = False
        self.make()

    def make(self) -> None:
        torch.manual_seed(0)
        self.make_network()

    def make_network(self) -> None:
        """Create the submodules."""
        raise TypeError(f"{type(self).__name__} must define make_network")

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of one batch."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def record(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.record(self.loss(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.record(self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


# -- automatic optimization ---------------------------------------------------------------------------------------
class Language(Task):
    """A causal language model."""

    network: dict[str, Any] = {}

    def make_network(self) -> None:
        self.net = TinyLM(width=32, **self.network)

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class TiedLanguage(Language):
    """The head is the embedding."""

    network = {"tied": True}


class DropoutLanguage(Language):
    """Dropout inside the blocks: recomputation must draw the same masks."""

    network = {"dropout": 0.2}


def token_batches() -> Any:
    return loader(list(torch.randint(0, 64, (NUM_BATCHES, 4, 12), generator=generator())))


class Tabular(Task):
    """Category embeddings and an MLP; the batch is a dataclass."""

    def make_network(self) -> None:
        self.embeddings = nn.ModuleList(nn.Embedding(5, 4) for _ in range(2))
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.SiLU()) for _ in range(3)))
        self.out = nn.Linear(16, 1)

    def loss(self, batch: Row) -> Tensor:
        categories = [e(batch.categories[:, i]) for i, e in enumerate(self.embeddings)]
        return F.mse_loss(self.out(self.layers(torch.cat([batch.numbers, *categories], 1))).squeeze(1), batch.target)


def tabular_batches() -> Any:
    g = generator()
    return loader(
        [
            Row(torch.randn(6, 8, generator=g), torch.randint(0, 5, (6, 2), generator=g), torch.randn(6, generator=g))
            for _ in range(NUM_BATCHES)
        ]
    )


class Forecasting(Task):
    """A stateful LSTM: its hidden state goes on from batch to batch. The batch is ``(dict, tuple)``."""

    def make_network(self) -> None:
        self.mixers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 1)
        self.state: tuple[Tensor, Tensor] | None = None

    def on_train_epoch_start(self) -> None:
        self.state = None

    def loss(self, batch: tuple[dict[str, Any], tuple[Tensor, None]]) -> Tensor:
        x = batch[0]["past"]
        for mixer in self.mixers:
            x = mixer(x)
        y, state = self.rnn(x, self.state)
        self.state = (state[0].detach(), state[1].detach())
        return F.mse_loss(self.out(y).squeeze(-1), batch[1][0])


def forecasting_batches() -> Any:
    g = generator()
    return loader(
        [
            ({"past": torch.randn(4, 6, 8, generator=g), "name": "series"}, (torch.randn(4, 6, generator=g), None))
            for _ in range(NUM_BATCHES)
        ]
    )


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Vision(Task):
    """A CNN with BatchNorm (statistics must be updated once a step) and a scheduler that steps every batch."""

    def make_network(self) -> None:
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.Sequential(*(ConvBlock(8) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.head(self.stages(self.stem(batch[0])).mean((2, 3))), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def image_batches() -> Any:
    g = generator()
    return loader(
        [[torch.randn(4, 3, 8, 8, generator=g), torch.randint(0, 4, (4,), generator=g)] for _ in range(NUM_BATCHES)]
    )


class Autoencoder(Task):
    """The encoder is frozen at first and unfrozen in epoch 1, with a parameter group of its own."""

    def make_network(self) -> None:
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.decoder = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.encoder.requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.decoder(self.encoder(batch)), batch)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            late = [p for p in self.encoder.parameters() if p.is_floating_point()]
            for parameter in late:
                parameter.requires_grad_(True)
            self.optimizers().add_param_group({"params": late, "lr": 1e-3})

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.decoder.parameters(), lr=1e-2)


def vector_batches() -> Any:
    return loader(list(torch.randn(NUM_BATCHES, 6, 8, generator=generator())))


class NoisyBlock(nn.Module):
    """Draws noise in its forward, as diffusion models and VAEs do."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.mean(x) + 0.1 * torch.randn_like(x) * F.softplus(self.scale(x)) + time


class Diffusion(Task):
    """Denoising with random times and sampling inside the blocks: recomputation must replay the draws."""

    def make_network(self) -> None:
        self.blocks = nn.ModuleList(NoisyBlock() for _ in range(3))

    def loss(self, batch: Tensor) -> Tensor:
        time = torch.rand(len(batch), 1, device=batch.device)
        noise = torch.randn_like(batch)
        x = batch * (1 - time) + noise * time
        for block in self.blocks:
            x = block(x, time)
        return F.mse_loss(x, noise)


class Messages(nn.Module):
    """One round of message passing."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        gathered = torch.zeros_like(nodes).index_add(0, edges[1], self.other(nodes)[edges[0]])
        return F.relu(self.own(nodes) + gathered)


class GraphNetwork(Task):
    """The batch is an object with tensor attributes and ``to``."""

    def make_network(self) -> None:
        self.rounds = nn.ModuleList(Messages() for _ in range(2))
        self.out = nn.Linear(8, 1)

    def loss(self, batch: Graph) -> Tensor:
        nodes = batch.nodes
        for messages in self.rounds:
            nodes = messages(nodes, batch.edges)
        return F.mse_loss(self.out(nodes.mean(0)), batch.target)


def graph_batches() -> Any:
    g = generator()
    return loader(
        [
            Graph(torch.randn(5, 8, generator=g), torch.randint(0, 5, (2, 9), generator=g), torch.randn(1, generator=g))
            for _ in range(NUM_BATCHES)
        ]
    )


class MappingBatch(Autoencoder):
    """The batch is a mapping of its own class, like a TensorDict; every layer is trained."""

    def make_network(self) -> None:
        super().make_network()
        self.encoder.requires_grad_(True)

    def loss(self, batch: TensorMapping) -> Tensor:
        assert isinstance(batch, TensorMapping)
        return super().loss(batch["observation"])

    def on_train_epoch_start(self) -> None:
        """Unfreeze nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=1e-3)


def mapping_batches() -> Any:
    g = generator()
    return loader([TensorMapping({"observation": torch.randn(6, 8, generator=g)}, 6) for _ in range(NUM_BATCHES)])


class LayerWise(Language):
    """A learning rate per layer, a key of the user's own in each group, and a lambda per group."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(block.parameters()), "lr": 1e-2 * 0.5**i, "layer": i}
            for i, block in enumerate(self.net.blocks)
        ]
        inside = {id(p) for group in groups for p in group["params"]}
        groups.append({"params": [p for p in self.parameters() if id(p) not in inside], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        warm = [lambda step, i=i: min(1.0, (step + 1) / (i + 2)) for i in range(len(groups))]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Stateless(Language):
    """SGD without momentum: an optimizer that keeps no state."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LineSearch(Autoencoder):
    """LBFGS calls its closure several times a step."""

    def make_network(self) -> None:
        super().make_network()
        self.encoder.requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        """Unfreeze nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Physics(Task):
    """The forward differentiates the network by its input (``create_graph=True``), as PINNs and force fields do."""

    def make_network(self) -> None:
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
        self.energy = nn.Linear(8, 1)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.enable_grad():
            x = batch.clone().requires_grad_(True)
            energy = self.energy(self.layers(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return F.mse_loss(force, batch) + energy**2 * 1e-4


# -- manual optimization ------------------------------------------------------------------------------------------
class Manual(Task):
    """Two optimizers, each with a loss and a scheduler of its own."""

    automatic = False

    def make_network(self) -> None:
        self.left = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.right = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))

    def loss(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.right(self.left(batch)), batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
            loss = self.record(self.loss(batch))
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (self.left, self.right)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class GAN(Task):
    """``toggle_optimizer`` flips ``requires_grad`` of the other network."""

    automatic = False

    def make_network(self) -> None:
        self.generator = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        self.critic = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1))

    def loss(self, batch: Tensor) -> Tensor:
        return -self.critic(self.generator(batch)).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self.record(self.loss(torch.randn_like(batch)))
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        fake = self.generator(torch.randn_like(batch)).detach()
        loss = self.record(F.softplus(-self.critic(batch)).mean() + F.softplus(self.critic(fake)).mean())
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.5, 0.9)) for m in (self.generator, self.critic)]


class RetainGraph(Manual):
    """Two losses on one graph: ``retain_graph=True``, then a second backward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        hidden = self.left(batch)
        out = self.right(hidden)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.record(F.mse_loss(out, batch)), retain_graph=True)
        self.manual_backward(self.record(out.pow(2).mean() * 0.1 + hidden.abs().mean() * 0.1))
        first.step()
        second.step()


class SeveralSteps(Manual):
    """Three optimizer steps in one ``training_step``; ``global_step`` counts each."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in batch.chunk(3):
            optimizer.zero_grad()
            self.manual_backward(self.record(self.loss(part)))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


# -- transformers -------------------------------------------------------------------------------------------------
class HfLlama(Task):
    """A causal model of transformers, given its labels."""

    def make_network(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        self.model = LlamaForCausalLM(config).train()

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


class HfBert(Task):
    """A classifier of transformers with a new head; the batch is what its collator makes."""

    def make_network(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            num_labels=3,
        )
        self.model = BertForSequenceClassification(config).train()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


def classification_batches() -> Any:
    g = generator()
    return loader(
        [
            {
                "input_ids": torch.randint(0, 64, (4, 8), generator=g),
                "attention_mask": (torch.arange(8) < torch.randint(4, 9, (4, 1), generator=g)).long(),
                "labels": torch.randint(0, 3, (4,), generator=g),
            }
            for _ in range(NUM_BATCHES)
        ]
    )


# -- the table ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """One kind of module.

    Args:
        task: Its class, without a Lightning base.
        batches: Makes its DataLoader.
        blocks: ``modules`` for methods that act on repeated blocks.
        auto: Whether ``modules="auto"`` finds those blocks.
        trainer: Trainer arguments this kind is trained with.

    """

    task: type[Task]
    batches: Callable[[], Any]
    blocks: tuple[str, ...]
    auto: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "language": Kind(Language, token_batches, ("net.blocks.*",), trainer={"accumulate_grad_batches": 2}),
    "tied": Kind(TiedLanguage, token_batches, ("Block",)),
    "dropout": Kind(DropoutLanguage, token_batches, ("Block",), trainer={"gradient_clip_val": 0.5}),
    "layer_wise": Kind(LayerWise, token_batches, ("Block",)),
    "stateless": Kind(Stateless, token_batches, ("Block",)),
    "tabular": Kind(Tabular, tabular_batches, ("layers.?",)),
    "forecasting": Kind(Forecasting, forecasting_batches, ("mixers.?",)),
    "vision": Kind(Vision, image_batches, ("ConvBlock",)),
    "autoencoder": Kind(Autoencoder, vector_batches, ("encoder.?", "decoder.?")),
    "diffusion": Kind(Diffusion, vector_batches, ("NoisyBlock",)),
    "graph": Kind(GraphNetwork, graph_batches, ("Messages",)),
    "mapping": Kind(MappingBatch, mapping_batches, ("encoder.?", "decoder.?")),
    "line_search": Kind(LineSearch, vector_batches, ("encoder.?", "decoder.?")),
    "physics": Kind(Physics, vector_batches, ("layers.?",)),
    "manual": Kind(Manual, vector_batches, ("left.?", "right.?")),
    "gan": Kind(GAN, vector_batches, ("generator.?", "critic.0")),
    "retain_graph": Kind(RetainGraph, vector_batches, ("left.?", "right.?")),
    "several_steps": Kind(SeveralSteps, vector_batches, ("left.?", "right.?")),
    "hf_llama": Kind(HfLlama, token_batches, ("LlamaDecoderLayer",)),
    "hf_bert": Kind(HfBert, classification_batches, ("BertLayer",)),
}


def _in_setup(self: Any, stage: str) -> None:
    if not self.made:
        self.made = True
        Task.make(self)


def _in_configure_model(self: Any) -> None:
    if not self.made:
        self.made = True
        Task.make(self)


def _doubled_in_setup(self: Any, stage: str) -> None:
    if not hasattr(self, "ensemble"):
        import copy

        self.ensemble = copy.deepcopy(nn.ModuleDict(dict(self.named_children())))


def _later(self: Any) -> None:
    self.made = False


PLACES: dict[str, dict[str, Any]] = {
    "init": {},
    "setup": {"make": _later, "setup": _in_setup},
    "configure_model": {"make": _later, "configure_model": _in_configure_model},
    "doubled": {"setup": _doubled_in_setup},
}


@lru_cache(maxsize=None)
def task_class(kind: str, namespace: str = "lightning.pytorch", place: str = "init") -> type:
    """Return the LightningModule class of a kind: its namespace, and where its network is made."""
    import importlib

    base = importlib.import_module(namespace).LightningModule
    task = KINDS[kind].task
    return type(f"{task.__name__}Module", (task, base), dict(PLACES[place]))


def build(kind: str, namespace: str = "lightning.pytorch", place: str = "init") -> Any:
    """Return a fresh module of a kind, the same weights every time."""
    return task_class(kind, namespace, place)()
