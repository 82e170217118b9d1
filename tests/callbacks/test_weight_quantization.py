"""WeightQuantization in a Trainer: what is left to train, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import LoRA, QLoRA, WeightQuantization, apply
from lightning_memsave.errors import ConfigurationError, IncompatibleMethodsError, MissingDependencyError

KINDS = ("nf4", "fp4", "int8")


class Probe(LitLM):
    """A frozen network with a new head."""

    def _build(self) -> None:
        super()._build()
        self.net.requires_grad_(False)
        self.net.head = nn.Linear(64, 64)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_trains_on_a_quantized_backbone(kind: str, precision: str) -> None:
    module = Probe(lr=1e-2)
    trainer = make_trainer(callbacks=[WeightQuantization(kind)], max_epochs=2, precision=precision)
    trainer.fit(module, make_loader(), make_loader())
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["net.head.weight", "net.head.bias"]
    assert sum(module.losses[3:]) < sum(module.losses[:3])
    assert sum(not p.is_floating_point() for p in module.parameters()) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_with_lora_only_adapters_train(kind: str) -> None:
    module = LitLM(lr=1e-2)
    savers = [LoRA(rank=4), WeightQuantization(kind, skip=["*.down"], compute_dtype="bf16")]
    make_trainer(callbacks=savers, max_epochs=2).fit(module, make_loader())
    assert all("lora_" in n for n, p in module.named_parameters() if p.requires_grad)
    assert sum(not p.is_floating_point() for p in module.parameters()) == 10
    assert sum(module.losses[3:]) < sum(module.losses[:3])


def test_a_fit_with_nothing_left_to_train_is_refused_with_what_to_write() -> None:
    module = LitLM()
    module.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"(?s)no trainable parameter left in LitLM.*LoRA\(rank=8\).*QLoRA"):
        make_trainer(callbacks=[WeightQuantization()]).fit(module, make_loader())


class LineSearch(LitLM):
    """LBFGS over everything, or over what trains."""

    only_trainable = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad or not self.only_trainable])]


@pytest.mark.parametrize("saver", [WeightQuantization, QLoRA])
def test_lbfgs_over_packed_weights_is_refused_by_name(saver: Any) -> None:
    module = LineSearch()
    with pytest.raises(
        ConfigurationError, match=rf"{saver.__name__}: LBFGS was given 12 quantized weights .*if p.requires_grad"
    ):
        make_trainer(callbacks=[saver()]).fit(module, make_loader())
    assert module.losses == []


def test_lbfgs_over_what_trains_runs() -> None:
    module = LineSearch()
    module.only_trainable = True
    make_trainer(callbacks=[WeightQuantization()], max_steps=1).fit(module, make_loader())
    assert module.losses[-1] < module.losses[0]


class TwoOptimizers(LitLM):
    """One optimizer for the linear layers of the blocks, one for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        blocks = [p for p in self.net.blocks.parameters() if p.ndim > 1 and p.requires_grad]
        return [torch.optim.AdamW(blocks), torch.optim.AdamW(self.net.embedding.parameters())]


class WrongGroups(LitLM):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=-1.0)


def test_an_optimizer_left_with_nothing_is_said_by_name() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"WeightQuantization: configure_optimizers of TwoOptimizers makes an optimizer of no parameters.*skip=",
    ):
        make_trainer(callbacks=[WeightQuantization()]).fit(TwoOptimizers(), make_loader())
    with pytest.raises(ValueError, match="Invalid learning rate"):  # what else is wrong stays torch's to say
        make_trainer(callbacks=[WeightQuantization()]).fit(WrongGroups(), make_loader())


def test_evaluation_needs_nothing_to_train() -> None:
    module = LitLM()
    module.requires_grad_(False)
    make_trainer(callbacks=[WeightQuantization()]).validate(module, make_loader(), verbose=False)
    assert sum(p.dtype == torch.uint8 for p in module.parameters()) == 12


def test_an_explicit_choice_that_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"net\.head trains \(requires_grad=True next to frozen weights\)"):
        make_trainer(callbacks=[WeightQuantization(modules="net.head")]).fit(Probe(), make_loader())


@pytest.mark.parametrize("kind", KINDS)
def test_undo_leaves_the_rounded_values(kind: str) -> None:
    module = LitLM()
    ids = next(iter(make_loader()))
    applied = apply(module, [WeightQuantization(kind)])
    expected = module.net(ids)
    applied.undo()
    assert torch.equal(module.net(ids), expected)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "nf5"}, "kind='nf5' is not one of 'nf4', 'fp4', 'int8'; did you mean 'nf4'"),
        ({"kind": "int4"}, "kind='int4' is not one of .* did you mean 'int8'"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype='bfloat16' is not one of .* did you mean 'bf16'"),
        ({"modules": ""}, "modules='' selects nothing"),
        ({"skip": "auto"}, '"auto" stands alone'),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WeightQuantization(**arguments)


def test_a_missing_library_gives_the_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        MissingDependencyError, match=r'WeightQuantization needs bitsandbytes.*"lightning-memsave\[bnb\]"'
    ):
        apply(LitLM(), [WeightQuantization()])


def test_fsdp1_is_refused_by_the_table() -> None:
    from lightning_memsave.planner.compatibility import check_methods

    with pytest.raises(IncompatibleMethodsError, match="one dtype"):
        check_methods(["WeightQuantization"], "fsdp1")
