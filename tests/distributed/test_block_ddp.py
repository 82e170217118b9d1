"""BlockDDPStrategy on two processes: what DDP computes, in less memory, and never a hang."""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import LitLM, TinyLM, make_loader, make_trainer
from lightning.pytorch.strategies import DDPStrategy
from live_bytes import LiveBytes
from packaging.version import Version
from torch import Tensor, nn

from lightning_memsave import (
    ActivationCheckpointing,
    BlockDDPStrategy,
    ConfigurationError,
    EarlyZeroGrad,
    GradientRelease,
    LoRA,
    LowMemoryOptimizer,
    QLoRA,
)

Run = Callable[..., list[Any]]
State = dict[str, Tensor]


def block_ddp(**arguments: Any) -> BlockDDPStrategy:
    """Small buckets: 14 of them for ``LitLM``."""
    return BlockDDPStrategy(**{"bucket_size": "20kB", **arguments})


def state_of(module: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def train(strategy: Any, *callbacks: Any, module: Any = None, loaders: Any = None, **options: Any) -> tuple[Any, Any]:
    """Fit for two epochs, each rank on its own half of the batches."""
    warnings.simplefilter("ignore")
    module = LitLM(dropout=0.0) if module is None else module
    fit = {k: options.pop(k) for k in ("ckpt_path",) if k in options}
    namespace = options.pop("namespace", pl)
    trainer = make_trainer(
        namespace, callbacks=[*callbacks], strategy=strategy, devices=2, **{"max_epochs": 2, **options}
    )
    torch.manual_seed(1)
    trainer.fit(module, *(loaders or [make_loader(batch_size=4)]), **fit)
    return module, trainer


def differences(a: State, b: State) -> list[str]:
    assert list(a) == list(b)
    return [k for k in b if not torch.equal(a[k], b[k])]


# -- what DDP computes -------------------------------------------------------------------------------------------------
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm, accumulate": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "clip by value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


def _settings(rank: int) -> dict[str, list[str]]:
    found = {}
    for name, options in SETTINGS.items():
        theirs, ours = train("ddp", **options), train(block_ddp(), **options)
        found[name] = differences(state_of(ours[0]), state_of(theirs[0]))
        assert ours[0].losses == theirs[0].losses
    return found


def test_every_bit_is_that_of_ddp(ranks: Run) -> None:
    for found in ranks(_settings):
        assert found == {name: [] for name in SETTINGS}


def _callbacks(name: str) -> list[Any]:
    return {
        "checkpointing": [ActivationCheckpointing()],
        "8-bit optimizer, early zero grad": [LowMemoryOptimizer("adamw_8bit"), EarlyZeroGrad()],
        "LoRA": [LoRA(rank=4)],
        "QLoRA": [QLoRA(rank=4), ActivationCheckpointing()],
    }[name]


def _with_methods(rank: int) -> dict[str, list[str]]:
    found = {}
    for name in ("checkpointing", "8-bit optimizer, early zero grad", "LoRA", "QLoRA"):
        theirs, ours = train("ddp", *_callbacks(name)), train(block_ddp(), *_callbacks(name))
        found[name] = differences(state_of(ours[0]), state_of(theirs[0]))
        assert ours[0].losses == theirs[0].losses
    return found


def test_with_the_methods_of_this_package_every_bit_is_that_of_ddp(ranks: Run) -> None:
    for found in ranks(_with_methods):
        assert not [name for name, different in found.items() if different]


def _released(rank: int) -> dict[str, list[str]]:
    found = {}
    for name, options in SETTINGS.items():
        release = GradientRelease(clip="two_pass", accumulate="host")
        theirs, ours = train("ddp", **options), train(block_ddp(), release, **options)
        a, b = state_of(ours[0]), state_of(theirs[0])
        found[name] = differences(a, b)
    return found


def test_gradients_released_inside_backward_train_as_ddp(ranks: Run) -> None:
    for found in ranks(_released):
        assert not [name for name, different in found.items() if different]


def in_namespace(name: str) -> Any:
    """``LitLM`` as a module of a namespace."""
    namespace = importlib.import_module(name)
    if name == "lightning.pytorch":
        return namespace, LitLM()
    members = {k: v for k, v in vars(LitLM).items() if inspect.isfunction(v)}

    def init(self: Any) -> None:
        namespace.LightningModule.__init__(self)
        self.build_in, self.lr, self.network, self.losses = "init", 1e-3, {}, []
        self._build()

    return namespace, type("LitLM", (namespace.LightningModule,), {**members, "__init__": init})()


def _namespaces(rank: int, folder: str) -> dict[str, list[Any]]:
    found = {}
    for name in ("lightning.pytorch", "pytorch_lightning"):
        for how in ("memsave_ddp", "object"):
            namespace, theirs = in_namespace(name)
            _, ours = in_namespace(name)
            train("ddp", module=theirs, namespace=namespace)
            # one of the user's own; before Lightning 2.6 the asynchronous one cannot save after a fit
            kind = "AsyncCheckpointIO" if Version(pl.__version__) >= Version("2.6") else "TorchCheckpointIO"
            io = getattr(importlib.import_module(f"{name}.plugins.io"), kind)()
            _, trainer = train(
                how if how == "memsave_ddp" else block_ddp(), module=ours, namespace=namespace, plugins=[io]
            )
            trainer.save_checkpoint(f"{folder}/{name}.ckpt")
            io.teardown()
            dist.barrier()
            saved = torch.load(f"{folder}/{name}.ckpt", weights_only=True)
            launcher = type(trainer.strategy.launcher).__mro__[1].__module__
            found[f"{name} {how}"] = [
                differences(state_of(ours), state_of(theirs)),
                differences(saved["state_dict"], state_of(theirs)),
                launcher.startswith(name),
            ]
    return found


def test_the_trainers_of_both_namespaces_take_the_name_and_the_object(ranks: Run, tmp_path: Any) -> None:
    for found in ranks(_namespaces, str(tmp_path)):
        assert len(found) == 4
        assert all(value == [[], [], True] for value in found.values()), found


# -- gradients that are missing ----------------------------------------------------------------------------------------
class Branches(LitLM):
    """Skips a block that depends on the step and, in odd steps, on the rank; one layer is never used."""

    def __init__(self, **network: Any) -> None:
        super().__init__(depth=4, **network)
        self.net.never = nn.Linear(3, 3)

    def loss(self, batch: Tensor) -> Tensor:
        step = self.global_step
        skipped = (step + self.global_rank * (step % 2)) % 4 if step else None
        x = self.net.embedding(batch[:, :-1])
        for number, block in enumerate(self.net.blocks):
            x = x if number == skipped else block(x)
        return F.cross_entropy(self.net.head(self.net.norm(x)).flatten(0, 1), batch[:, 1:].flatten())


def _branches(rank: int) -> list[Any]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning_memsave").addHandler(handler)
    found: list[Any] = []
    for options in ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}):
        theirs, _ = train(DDPStrategy(find_unused_parameters=True), module=Branches(), **options)
        ours, _ = train(block_ddp(), module=Branches(), **options)
        release = GradientRelease(accumulate="host", clip="two_pass")
        released, _ = train(block_ddp(), release, module=Branches(), **options)
        # The sum of squares of a second backward: the worst difference of a weight seen is 0.
        far = [k for k, v in state_of(ours).items() if not torch.allclose(v, released.state_dict()[k], 0, 1e-6)]
        found.append((differences(state_of(ours), state_of(theirs)), far))
    return [found, lines]


def test_parameters_without_a_gradient_are_those_of_ddp_that_looks_for_them(ranks: Run) -> None:
    (first, lines), (second, _) = ranks(_branches)
    assert first == second == [([], [])] * 2
    never = [line for line in lines if "no rank has a gradient for net.never.weight, net.never.bias" in line]
    assert len(never) == 4, "once a run with this strategy"
    assert any("rank 0 has no gradient for net.blocks.1.norm1.weight" in line for line in lines)


class OnlyHere(LitLM):
    """On rank one the loss depends on one parameter alone."""

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) if self.global_rank == 0 else self.net.norm.bias.square().sum()


def _only_here(rank: int) -> list[Any]:
    theirs, _ = train(DDPStrategy(find_unused_parameters=True), module=OnlyHere())
    ours, _ = train(block_ddp(), module=OnlyHere())
    return differences(state_of(ours), state_of(theirs))


def test_a_rank_that_uses_one_parameter_takes_part_in_all(ranks: Run) -> None:
    assert ranks(_only_here) == [[], []]


class Unfreezing(LitLM):
    """The first block joins in the second epoch."""

    def on_train_epoch_start(self) -> None:
        self.net.blocks[0].requires_grad_(self.current_epoch > 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def _unfrozen(rank: int) -> tuple[State, State]:
    module = Unfreezing()
    module.net.blocks[0].requires_grad_(False)
    before = state_of(module)
    module, _ = train(block_ddp(), module=module)
    return before, state_of(module)


def test_parameters_unfrozen_during_training_are_averaged_too(ranks: Run) -> None:
    (before, first), (_, second) = ranks(_unfrozen)
    assert differences(first, second) == []
    assert "net.blocks.0.up.weight" in differences(first, before)


class TwoOptimizers(LitLM):
    """Manual optimization: two parts in turn, the other part toggled off; the gradient is accumulated in two calls."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = [*self.net.embedding.parameters(), *self.net.blocks[0].parameters()]
        second = [*self.net.blocks[1].parameters(), *self.net.head.parameters()]
        return [torch.optim.AdamW(part, lr=1e-3) for part in (first, second)]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self.loss(batch[:2]) / 2)
            with optimizer.toggle_model():
                self.manual_backward(self.loss(batch[2:]) / 2)
                optimizer.step()
                optimizer.zero_grad()


def _manual(rank: int) -> list[str]:
    theirs, _ = train(DDPStrategy(find_unused_parameters=True), module=TwoOptimizers())
    ours, _ = train(block_ddp(), module=TwoOptimizers())
    return differences(state_of(ours), state_of(theirs))


def test_toggled_optimizers_and_several_backward_calls_are_those_of_ddp(ranks: Run) -> None:
    assert ranks(_manual) == [[], []]


class Plain(TwoOptimizers):
    """Calls ``backward`` itself, around Lightning."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.loss(batch).backward()
            optimizer.step()
            self.zero_grad()


def _plain_backward(rank: int) -> State:
    return state_of(train(block_ddp(), module=Plain())[0])


def test_a_backward_call_around_lightning_is_averaged_too(ranks: Run) -> None:
    first, second = ranks(_plain_backward)
    assert differences(first, second) == []


# -- buffers and the start ---------------------------------------------------------------------------------------------
class Normed(LitLM):
    """Batch norm between the blocks, and a position buffer that is expanded."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = TinyLM(depth=1)
        self.bn = nn.BatchNorm1d(64)
        self.register_buffer("positions", torch.full((1, 16), float(seed)).expand(4, 16))

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.blocks[0](self.net.embedding(batch[:, :-1]))
        hidden = self.bn(hidden.transpose(1, 2)).transpose(1, 2)
        return F.cross_entropy(self.net.head(hidden).flatten(0, 1), batch[:, 1:].flatten())


def _buffers(rank: int) -> list[Any]:
    found = []
    for options in ({}, {"accumulate_grad_batches": 2}):
        theirs = Normed()
        theirs.positions = theirs.positions.clone()  # DDP cannot write into an expanded buffer
        ours = Normed()
        loaders = [make_loader(batch_size=4), make_loader(batch_size=4)]
        train(DDPStrategy(find_unused_parameters=True), module=theirs, loaders=loaders, **options)
        _, trainer = train(block_ddp(), module=ours, loaders=loaders, **options)
        found.append((differences(state_of(ours), state_of(theirs)), float(trainer.callback_metrics["val_loss"])))
    apart, _ = train(block_ddp(broadcast_buffers=False), module=Normed())
    return [found, state_of(apart)]


def test_buffers_follow_rank_zero_as_under_ddp(ranks: Run) -> None:
    (first, apart), (second, other) = ranks(_buffers)
    assert [f[0] for f in first] == [f[0] for f in second] == [[], []]
    assert differences(apart, other) == ["bn.running_mean", "bn.running_var"], (
        "broadcast_buffers=False keeps them apart"
    )


def _seeds(rank: int) -> list[Any]:
    module = Normed(seed=rank)
    _, trainer = train(block_ddp(), module=module, max_steps=0, max_epochs=1)
    return [state_of(module), type(trainer.model).__name__]


def test_training_starts_from_rank_zeros_weights_and_buffers(ranks: Run) -> None:
    (first, name), (second, _) = ranks(_seeds)
    assert differences(first, second) == []
    assert differences(first, state_of(Normed(seed=0))) == []
    assert name == "Normed", "no wrapper"


def _packed(rank: int, kind: str) -> list[Any]:
    torch.manual_seed(0)
    module = LitLM()
    torch.manual_seed(rank)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    _, _ = train(block_ddp(), QLoRA(rank=4, kind=kind), module=module, max_steps=1, max_epochs=1)
    with torch.no_grad():
        return [module.net(torch.arange(8)[None]), state_of(module)]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_travel_with_their_scales(kind: str, ranks: Run) -> None:
    (first, state), (second, other) = ranks(_packed, kind)
    assert torch.equal(first, second), "another rank's bytes with this rank's scales are other weights"
    assert any(v.dtype in (torch.uint8, torch.int8) for v in state.values())
    assert differences(state, other) == []


class Synced(LitLM):
    """Holds a synchronized batch norm, which no CPU can run, beside the network."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)


def _synced(rank: int) -> list[Any]:
    theirs, _ = train(block_ddp(), module=Synced())  # DDP itself refuses the layer on a CPU
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            seen.append((type(module.bn).__name__, trainer.strategy._group is not None))

    ours, _ = train(block_ddp(), Look(), module=Synced(), sync_batchnorm=True)
    return [differences(state_of(ours), state_of(theirs)), seen]


def test_synchronized_batch_norm_keeps_its_collectives_apart_from_ours(ranks: Run) -> None:
    assert ranks(_synced) == [[[], [("SyncBatchNorm", True)]]] * 2


# -- memory and messages -----------------------------------------------------------------------------------------------
class Counted(LitLM):
    """Counts the bytes of every tensor made in a step, beside those that were there."""

    def on_train_start(self) -> None:
        self.held: list[int] = []

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2:
            self.meter = LiveBytes()
            self.meter.__enter__()

    def on_after_backward(self) -> None:
        if "meter" in self.__dict__:
            self.after_backward = self.meter.current

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "meter" in self.__dict__:
            self.meter.__exit__(None, None, None)
            self.held = [self.meter.peak, self.after_backward]
            del self.meter

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, foreach=False)


def _bytes(rank: int) -> dict[str, Any]:
    def gradients(strategy: Any, *callbacks: Any) -> list[int]:
        # One row of two tokens: the gradients are all there is.
        loaders = [make_loader(batch_size=1, num_tokens=2)]
        return train(strategy, *callbacks, module=Counted(), loaders=loaders, max_epochs=1)[0].held

    return {
        "plain": gradients(block_ddp(bucket_size=1)),
        "small buckets": gradients(block_ddp()),
        "released": gradients(block_ddp(), GradientRelease()),
        "whole": sum(p.numel() * 4 for p in LitLM().parameters()),
    }


def test_after_backward_the_gradients_are_there_once(ranks: Run) -> None:
    for found in ranks(_bytes):
        whole = found["whole"]
        # The loss and what is logged; a thread of gloo may still hold the last message for a moment.
        assert found["plain"][1] - whole < 8192 + 20_480
        assert abs(found["small buckets"][1] - found["plain"][1]) <= 20_480
        # In flight: two buckets of 20 kB, and one that is packed.
        assert found["small buckets"][0] - found["plain"][0] <= 4 * 20_480
        # None is left but that message.
        assert found["released"][1] < found["plain"][1] - whole + 1024 + 20_480
        assert found["released"][0] < found["plain"][0] - whole // 2


class CountedMessages:
    """Counts what is sent by ``all_reduce`` of tensors of more than one value."""

    def __enter__(self) -> CountedMessages:
        self.sizes: list[int] = []
        self.inner = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return self.inner(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *exception: object) -> None:
        dist.all_reduce = self.inner


def _messages(rank: int) -> list[Any]:
    found = []
    for accumulate in (1, 3):
        module = LitLM()
        values = sum(p.numel() for p in module.parameters())
        with CountedMessages() as sent:
            train(block_ddp(bucket_size="1MiB"), module=module, max_epochs=1, accumulate_grad_batches=accumulate)
        found.append([size for size in sent.sizes if size > 1000] == [values + 28] * (3 // accumulate))
    return found


def test_accumulated_batches_send_nothing(ranks: Run) -> None:
    assert ranks(_messages) == [[True, True]] * 2


def _reduced_hooks(rank: int) -> list[Any]:
    strategy = block_ddp()
    module, seen, alive = LitLM(), [], []
    names = {id(p): n for n, p in module.named_parameters()}

    def note(parameter: nn.Parameter) -> None:
        seen.append((names[id(parameter)], float(parameter.grad.double().sum())))
        alive.append(sum(p.grad.nbytes for p in module.parameters() if p.grad is not None))
        parameter.grad = None

    handle = strategy.register_reduced_hook(note)
    _, trainer = train(strategy, module=module, max_steps=2)
    handle.remove()
    count = len(seen)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, make_loader(batch_size=4))
    assert trainer.global_step == 4
    return [seen, max(alive[count // 2 :]), len(seen) == count, sorted(names.values())]


def test_a_reduced_hook_sees_the_average_of_each_parameter_once(ranks: Run) -> None:
    (first, alive, removed, names), (second, other, _, _) = ranks(_reduced_hooks)
    assert first == second, "the same average in the same order on both ranks"
    assert sorted(name for name, _ in first) == sorted([*names, *names])
    assert removed
    # Two messages in flight and one that fills, none larger than the largest weight of 64 KiB; of 421 KiB.
    assert max(alive, other) <= 3 * 65_536


# -- life --------------------------------------------------------------------------------------------------------------
def _resumed(rank: int, folder: str) -> list[Any]:
    whole, _ = train(block_ddp(), LowMemoryOptimizer("adamw_8bit"))
    _, trainer = train(block_ddp(), LowMemoryOptimizer("adamw_8bit"), max_epochs=1)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    resumed, trainer = train(block_ddp(), LowMemoryOptimizer("adamw_8bit"), ckpt_path=f"{folder}/half.ckpt")
    other, _ = train("ddp", LowMemoryOptimizer("adamw_8bit"), ckpt_path=f"{folder}/half.ckpt")
    keys = list(torch.load(f"{folder}/half.ckpt", weights_only=True)["state_dict"])
    left = sum(len(p._post_accumulate_grad_hooks or {}) for p in whole.parameters())
    return [
        differences(state_of(resumed), state_of(whole)),
        differences(state_of(other), state_of(whole)),
        keys == list(LitLM().state_dict()),
        left,
    ]


def test_checkpoints_resume_here_and_under_ddp_with_plain_keys(ranks: Run, tmp_path: Any) -> None:
    assert ranks(_resumed, str(tmp_path)) == [[[], [], True, 0]] * 2


def _other_loops(rank: int) -> list[Any]:
    strategies = ("ddp", block_ddp())
    found = []
    for strategy in strategies:
        trainer = make_trainer(strategy=strategy, devices=2)
        torch.manual_seed(rank)  # the weights of rank zero must win
        module = LitLM()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        loader = make_loader(batch_size=4)
        warnings.simplefilter("ignore")
        metrics = [*trainer.validate(module, loader, verbose=False), *trainer.test(module, loader, verbose=False)]
        found.append([metrics, torch.cat(trainer.predict(module, loader))])
    return [found[0][0] == found[1][0], torch.equal(found[0][1], found[1][1])]


def test_validate_test_and_predict_are_those_of_ddp(ranks: Run) -> None:
    assert ranks(_other_loops) == [[True, True]] * 2


class Failing(LitLM):
    """An exception in the middle of the first backward, which the training step of the user survives."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx == 0:
            handle = self.net.blocks[1].down.weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                self.manual_backward(self.loss(batch))
            handle.remove()
            self.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.zero_grad()


def _failed(rank: int) -> State:
    return state_of(train(block_ddp(bucket_size="1GiB"), module=Failing())[0])


def test_a_backward_that_failed_does_not_disturb_the_next(ranks: Run) -> None:
    first, second = ranks(_failed)
    assert differences(first, second) == []


class Reentrant(LitLM):
    """Checkpoints with ``use_reentrant=True``, whose backward passes are nested."""

    def loss(self, batch: Tensor) -> Tensor:
        x = self.net.embedding(batch[:, :-1])
        for block in self.net.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        if self.network.get("tied"):
            x = torch.utils.checkpoint.checkpoint(self.net.head, self.net.norm(x), use_reentrant=True)
        else:
            x = self.net.head(self.net.norm(x))
        return F.cross_entropy(x.flatten(0, 1), batch[:, 1:].flatten())


def _reentrant(rank: int) -> list[Any]:
    plain, _ = train("ddp")
    nested, _ = train(block_ddp(), module=Reentrant())
    with pytest.raises(RuntimeError) as caught:
        train(block_ddp(bucket_size=1), module=Reentrant(tied=True))
    return [differences(state_of(nested), state_of(plain)), str(caught.value)]


def test_reentrant_checkpointing_works_but_for_shared_parameters_which_are_named(ranks: Run) -> None:
    for different, message in ranks(_reentrant):
        assert different == []
        assert "net.embedding.weight got a second gradient in one backward" in message


def _not_the_same(rank: int) -> str:
    module = LitLM()
    if rank == 1:
        module.net.blocks[1].up.bias.requires_grad_(False)
    with pytest.raises(ConfigurationError) as caught:
        train(block_ddp(), module=module)
    return str(caught.value)


def test_ranks_that_train_different_parameters_are_refused_at_the_start(ranks: Run) -> None:
    for message in ranks(_not_the_same):
        assert "Rank 0 has net.blocks.1.up.bias [256] float32" in message
