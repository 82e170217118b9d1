"""Small modules with automatic optimization, one of every kind that people train.

A task is a plain class with no Lightning base, so that ``kinds.build`` can put it on the LightningModule of either
namespace. Each records its losses in ``losses``: two runs are compared number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch import Tensor, nn

from .batches import Graph, Row, TensorMapping, generator, loader

NUM_BATCHES = 3
WIDTH = 64  # a weight of 64 x 64 is the smallest that is quantized without being named


class Task:
    """What all kinds share; it is mixed into a LightningModule by ``build``."""

    automatic = True

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.watch: Callable[[Any], None] | None = None  # called with the module inside each training step
        if not self.automatic:
            self.automatic_optimization = False
        self.make()

    def make(self) -> None:
        torch.manual_seed(0)
        self.make_network()
        torch.manual_seed(1)  # where it is made must not change what is drawn later

    def make_network(self) -> None:
        """Create the submodules."""
        raise TypeError(f"{type(self).__name__} must define make_network")

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of one batch."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def record(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        if self.watch is not None:
            self.watch(self)
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
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(3)))
        self.out = nn.Linear(WIDTH, 1)

    def loss(self, batch: Row) -> Tensor:
        categories = [e(batch.categories[:, i]) for i, e in enumerate(self.embeddings)]
        return F.mse_loss(self.out(self.layers(torch.cat([batch.numbers, *categories], 1))).squeeze(1), batch.target)


def tabular_batches() -> Any:
    g = generator()
    return loader(
        [
            Row(
                torch.randn(6, WIDTH - 8, generator=g),
                torch.randint(0, 5, (6, 2), generator=g),
                torch.randn(6, generator=g),
            )
            for _ in range(NUM_BATCHES)
        ]
    )


class Forecasting(Task):
    """A stateful LSTM: its hidden state goes on from batch to batch. The batch is ``(dict, tuple)``."""

    def make_network(self) -> None:
        self.mixers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 1)
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
            ({"past": torch.randn(4, 6, WIDTH, generator=g), "name": "series"}, (torch.randn(4, 6, generator=g), None))
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
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)))
        self.decoder = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)))
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
    return loader(list(torch.randn(NUM_BATCHES, 6, WIDTH, generator=generator())))


class NoisyBlock(nn.Module):
    """Draws noise in its forward, as diffusion models and VAEs do."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

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
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        gathered = torch.zeros_like(nodes).index_add(0, edges[1], self.other(nodes)[edges[0]])
        return F.relu(self.own(nodes) + gathered)


class GraphNetwork(Task):
    """The batch is an object with tensor attributes and ``to``."""

    def make_network(self) -> None:
        self.rounds = nn.ModuleList(Messages() for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def loss(self, batch: Graph) -> Tensor:
        nodes = batch.nodes
        for messages in self.rounds:
            nodes = messages(nodes, batch.edges)
        return F.mse_loss(self.out(nodes.mean(0)), batch.target)


def graph_batches() -> Any:
    g = generator()
    return loader(
        [
            Graph(
                torch.randn(5, WIDTH, generator=g),
                torch.randint(0, 5, (2, 9), generator=g),
                torch.randn(1, generator=g),
            )
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
    return loader([TensorMapping({"observation": torch.randn(6, WIDTH, generator=g)}, 6) for _ in range(NUM_BATCHES)])


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
        trained = [p for p in self.parameters() if p.requires_grad]  # LBFGS makes one vector of all it is given
        return torch.optim.LBFGS(trained, lr=0.1, max_iter=3)


class Physics(Task):
    """The forward differentiates the network by its input (``create_graph=True``), as PINNs and force fields do."""

    def make_network(self) -> None:
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        self.energy = nn.Linear(WIDTH, 1)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.enable_grad():
            x = batch.clone().requires_grad_(True)
            energy = self.energy(self.layers(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return F.mse_loss(force, batch) + energy**2 * 1e-4
