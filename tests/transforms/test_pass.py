"""The transform pass: order, run-once, all-or-nothing, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms._pass import Applied, Stage, Transform, TransformPass, applied_record


def make(name: str, stage: int, log: list[str], *, config: str = "", persistent: bool = False, **kwargs) -> Transform:
    def function(module: nn.Module) -> Applied:
        log.append(name + config)
        return Applied(
            summary=name, num_modules=1, undo=lambda: log.append(f"undo {name}{config}"), persistent=persistent
        )

    return Transform(name=name, stage=stage, function=function, config=config, **kwargs)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_order_is_ours_not_the_users(order: tuple[int, ...]) -> None:
    log: list[str] = []
    transforms = [make("A", Stage.CHECKPOINT, log), make("B", Stage.QUANTIZE, log), make("C", 25, log)]
    transform_pass = TransformPass()
    for index in order:
        transform_pass.add(transforms[index])
    transform_pass.run(nn.Linear(1, 1))
    assert log == ["B", "C", "A"]


def test_the_same_transform_twice_is_one() -> None:
    log: list[str] = []
    transform_pass = TransformPass()
    assert transform_pass.add(make("A", 10, log, config="(1)"))
    assert not transform_pass.add(make("A", 10, log, config="(1)"))
    transform_pass.run(nn.Linear(1, 1))
    assert log == ["A(1)"]


def test_other_settings_of_one_method_are_refused_unless_it_is_repeatable() -> None:
    transform_pass = TransformPass()
    transform_pass.add(make("A", 10, [], config="A(1)"))
    with pytest.raises(ConfigurationError, match=r"asked for twice with different settings, A\(1\) and A\(2\)"):
        transform_pass.add(make("A", 10, [], config="A(2)"))
    transform_pass = TransformPass()
    transform_pass.add(make("A", 10, [], config="A(1)", repeatable=True))
    assert transform_pass.add(make("A", 10, [], config="A(2)", repeatable=True))


def test_a_failing_transform_leaves_nothing_behind() -> None:
    log: list[str] = []

    def fail(module: nn.Module) -> Applied:
        raise RuntimeError("no")

    module = nn.Linear(1, 1)
    transform_pass = TransformPass()
    transform_pass.add(make("A", 10, log))
    transform_pass.add(make("B", 20, log, persistent=True))
    transform_pass.add(Transform(name="C", stage=30, function=fail))
    with pytest.raises(RuntimeError, match="no"):
        transform_pass.run(module)
    assert log == ["A", "B", "undo B", "undo A"]
    assert applied_record(module) == []


def test_undo_runs_backwards_once_and_can_leave_what_persists() -> None:
    log: list[str] = []
    module = nn.Linear(1, 1)
    transform_pass = TransformPass()
    for transform in (make("A", 10, log), make("B", 20, log, persistent=True), make("C", 30, log)):
        transform_pass.add(transform)
    done = transform_pass.run(module)
    log.clear()
    done.undo(persistent=False)
    done.undo(persistent=False)
    assert log == ["undo C", "undo A"]
    assert [t.name for t, _ in done] == ["B"]
    assert [entry["name"] for entry in applied_record(module)] == ["B"]
    done.undo()
    assert log[-1] == "undo B"
    assert len(done) == 0
    assert applied_record(module) == []


def test_what_a_module_carries_is_not_applied_again_and_survives_copies() -> None:
    log: list[str] = []
    module = nn.Linear(1, 1)
    for _ in range(2):
        transform_pass = TransformPass()
        transform_pass.add(make("A", 10, log, config="A()", persistent=True))
        transform_pass.run(module)
    assert log == ["AA()"]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert applied_record(copied) == [{"name": "A", "config": "A()"}]
        assert applied_record(copied) is not applied_record(module)


def test_a_module_that_carries_other_settings_is_refused() -> None:
    module = nn.Linear(1, 1)
    first, second = TransformPass(), TransformPass()
    first.add(make("A", 10, [], config="A(1)", persistent=True))
    first.run(module)
    second.add(make("A", 10, [], config="A(2)", persistent=True))
    with pytest.raises(ConfigurationError, match=r"already carries A\(1\).*A\(2\) was asked for"):
        second.run(module)
