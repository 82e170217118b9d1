"""The transform pass with no Trainer."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_memsave import Applied, ModelTransform, Stage, apply
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.errors import ConfigurationError, IncompatibleMethodsError
from lightning_memsave.planner import compatibility


class Mark(ModelTransform):
    stage = Stage.KERNEL

    def __init__(self, key: str = "first") -> None:
        self.key = key

    def apply(self, module: nn.Module) -> Applied:
        module.__dict__[self.key] = list(module.__dict__)
        return Applied(summary="marked", num_modules=1, undo=lambda: module.__dict__.pop(self.key))


class MarkLater(Mark):
    stage = Stage.COMPILE


class LoopOnly(Saver):
    def __init__(self) -> None:
        self.x = 1


def test_apply_runs_in_stage_order_and_undo_restores_the_module() -> None:
    module = nn.Linear(2, 2)
    before = dict(module.__dict__)
    applied = apply(module, [MarkLater("second"), Mark("first")])
    assert [t.name for t, _ in applied] == ["Mark", "MarkLater"]
    assert "first" in module.__dict__["second"]
    applied.undo()
    assert {k: v for k, v in module.__dict__.items() if k != "_memsave_applied"} == before


def test_a_callback_of_the_loop_is_refused_with_where_it_belongs() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r"LoopOnly works on a Trainer's loop.*Trainer\(callbacks="):
        apply(module, [Mark(), LoopOnly()])
    assert "first" not in module.__dict__


def test_conflicts_are_refused_before_the_module_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compatibility.METHOD_PAIRS, frozenset({"Mark", "MarkLater"}), "no.")
    module = nn.Linear(2, 2)
    with pytest.raises(IncompatibleMethodsError, match="Mark and MarkLater do not combine: no"):
        apply(module, [Mark(), MarkLater("b")])
    assert "first" not in module.__dict__


def test_a_transform_without_apply_says_what_to_define() -> None:
    class Empty(ModelTransform):
        stage = Stage.KERNEL

    with pytest.raises(TypeError, match="Empty must define apply"):
        apply(nn.Linear(1, 1), [Empty()])
