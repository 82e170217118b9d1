"""ChunkedLoss in a Trainer: unmodified modules, every kind of step, beside the other savers."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor

from lightning_memsave import (
    ActivationCheckpointing,
    ChunkedLoss,
    ConfigurationError,
    EarlyZeroGrad,
    LoRA,
    LowMemoryOptimizer,
    MemoryAudit,
    NothingToTransformError,
    apply,
)
from lightning_memsave.callbacks._session import Session
from lightning_memsave.transforms.deferred_logits import DeferCounts, DeferredLogits, defer_counts

# Losses near 4 over three steps in fp32: worst seen 9.6e-7.
TOLERANCE = 5e-6


class Spy(pl.Callback):
    """Keeps the counts of the run and what was reported, which are gone after it."""

    def __init__(self) -> None:
        self.counts = DeferCounts()
        self.lines: list[str] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.counts,) = defer_counts(pl_module).values()
        self.lines = [line for name, line in Session.of(trainer).lines if name == "ChunkedLoss"]


class Accurate(LitLM):
    """Logs the accuracy of its own logits beside the loss."""

    def __init__(self, **network: Any) -> None:
        super().__init__(**network)
        self.accuracies: list[float] = []

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.net(batch[:, :-1])
        self.accuracies.append(float((logits.argmax(-1) == batch[:, 1:]).float().mean()))
        return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])


class Manual(LitLM):
    """Optimizes manually, and looks at its logits after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accuracies: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        logits = self.net(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())
        self.accuracies.append(float((logits.argmax(-1) == batch[:, 1:]).float().mean()))


class Returning(LitLM):
    """Returns its logits, and keeps some."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch[:, :-1])
        self.kept = logits[:, -1].detach()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return {"loss": loss, "logits": logits}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += [float(outputs["logits"].detach().softmax(-1).max()), float(self.kept.exp().mean())]


def train(module: Any, *callbacks: Any, namespace: Any = pl, **trainer: Any) -> Any:
    torch.manual_seed(1)
    make_trainer(namespace, callbacks=list(callbacks), **trainer).fit(module, make_loader(), make_loader())
    return module


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0, atol=tolerance)
    for ours, theirs in zip(found.state_dict().values(), expected.state_dict().values()):
        # AdamW turns a gradient near zero into a whole step of 1e-3: worst seen 3e-5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=max(tolerance, 3e-4))


@pytest.mark.parametrize("kind", [LitLM, Accurate])
@pytest.mark.parametrize("tied", [False, True])
def test_training_and_validation_are_the_plain_ones_without_full_logits(kind: type, tied: bool) -> None:
    spy = Spy()
    found = train(kind(tied=tied), ChunkedLoss(chunk_tokens=16), spy)
    expected = train(kind(tied=tied))
    assert_close(found, expected)
    assert getattr(found, "accuracies", 0) == getattr(expected, "accuracies", 0)
    steps = 6  # three of training, three of validation
    assert (spy.counts.deferred, spy.counts.losses) == (steps, steps)
    assert not spy.counts.materialised
    assert spy.lines == ["defer the logits of net.head (64 classes); losses run in chunks of rows"]
    assert "forward" not in found.net.head.__dict__


def test_manual_optimization_may_look_at_the_accuracy_after_its_step() -> None:
    found, expected = train(Manual(), ChunkedLoss()), train(Manual())
    assert_close(found, expected)
    assert found.accuracies == expected.accuracies


def test_logits_that_leave_the_step_are_those_of_the_step_and_are_reported() -> None:
    spy = Spy()
    with pytest.warns(UserWarning, match=r"net.head: full logits \(30.00 KiB\) were made for held after the step"):
        found = train(Returning(), ChunkedLoss(), spy)
    expected = train(Returning())
    assert_close(found, expected)
    torch.testing.assert_close(torch.tensor(found.seen), torch.tensor(expected.seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_training_is_as_near_to_fp32_as_the_plain_one(precision: str) -> None:
    spy = Spy()
    found = train(LitLM(), ChunkedLoss(chunk_tokens=16), spy, precision=precision)
    expected = train(LitLM(), precision=precision)
    # bf16-true: a plain loss is rounded to 1/64 here, ours is not
    tolerance = 2e-2 if precision == "bf16-true" else 2e-3
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0, atol=tolerance)
    assert spy.counts.losses == 6
    assert not spy.counts.materialised


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_it_runs_beside_the_other_savers_in_both_namespaces(name: str) -> None:
    namespace = importlib.import_module(name)
    module_class = LitLM if namespace is pl else _of(namespace)

    def savers() -> list[Any]:
        return [
            LoRA(rank=2, train=["net.head"]),
            ActivationCheckpointing(),
            LowMemoryOptimizer("lion"),
            EarlyZeroGrad(),
        ]

    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    found = train(module_class(), ChunkedLoss(chunk_tokens=7), *savers(), namespace=namespace, **settings)
    expected = train(module_class(), *savers(), namespace=namespace, **settings)
    assert_close(found, expected)


def _of(namespace: Any) -> type:
    members = {k: v for k, v in vars(LitLM).items() if k not in ("__dict__", "__weakref__", "__init__")}

    def init(self: Any, **network: Any) -> None:
        namespace.LightningModule.__init__(self)
        self.build_in, self.lr, self.network, self.losses = "init", 1e-3, network, []
        self._build()

    return type("LitLM", (namespace.LightningModule,), {**members, "__init__": init})


def test_the_audit_says_what_ran_in_chunks_and_what_did_not() -> None:
    class Entropy(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) + 0 * self.net(batch).softmax(-1).log().mean()

    class Keep(pl.Callback):
        text = ""

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.text = (Session.of(trainer).directory / "audit.json").read_text()

    keep = Keep()
    train(LitLM(), ChunkedLoss(), MemoryAudit(), keep)
    assert "net.head: 1 losses and 0 other results ran in chunks, without full logits." in keep.text
    with pytest.warns(UserWarning, match=r"full logits .* were made for softmax"):
        train(Entropy(), ChunkedLoss(), MemoryAudit(), keep)
    assert "were made for softmax (1)" in keep.text


def test_a_backend_that_cannot_run_a_loss_is_said_once() -> None:
    class Smoothed(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            logits = self.net(batch[:, :-1]).flatten(0, 1)
            return F.cross_entropy(logits, batch[:, 1:].flatten(), label_smoothing=0.1)

    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    spy = Spy()
    train(Smoothed(), ChunkedLoss(backend="torch"), spy)
    assert len([line for line in spy.lines if 'backend="torch" was not used' in line]) == 1


def test_predictions_are_plain_tensors() -> None:
    module = LitLM()
    found = make_trainer(callbacks=[ChunkedLoss()]).predict(module, make_loader())
    expected = make_trainer().predict(module, make_loader())
    assert all(type(a) is Tensor and torch.equal(a, b) for a, b in zip(found, expected))


def test_an_exception_in_a_step_takes_the_deferring_heads_away() -> None:
    class Failing(LitLM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            assert type(self.net(batch)) is DeferredLogits
            raise RuntimeError("stop here")

    module = Failing()
    with pytest.raises(RuntimeError, match="stop here"):
        train(module, ChunkedLoss())
    assert "forward" not in module.net.head.__dict__


def test_apply_defers_without_a_trainer_and_undo_takes_it_back() -> None:
    module = LitLM()
    ids = torch.randint(0, 64, (2, 5))
    applied = apply(module, [ChunkedLoss()])
    assert type(module.net(ids)) is DeferredLogits
    with torch.no_grad():
        assert type(module.net(ids)) is Tensor
    applied.undo()
    assert type(module.net(ids)) is Tensor


def test_a_module_without_a_head_is_refused_by_name() -> None:
    class Small(LitLM):
        def _build(self) -> None:
            super()._build()
            self.net.head = torch.nn.Linear(64, 2)

    with pytest.raises(NothingToTransformError, match=r"ChunkedLoss: found no output head in Small"):
        train(Small(), ChunkedLoss())


def test_wrong_arguments_are_listed_at_construction() -> None:
    with pytest.raises(ConfigurationError) as error:
        ChunkedLoss(chunk_tokens=0, backend="cuda")  # type: ignore[arg-type]
    assert "chunk_tokens=0 must be an int of 1 or more" in str(error.value)
    assert "backend='cuda' is not a backend" in str(error.value)


def test_the_callback_is_configuration_only() -> None:
    callback = ChunkedLoss(chunk_tokens=128)
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(callback)))) == "ChunkedLoss(chunk_tokens=128)"
