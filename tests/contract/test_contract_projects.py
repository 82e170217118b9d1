"""Projects that hide their Trainer: only Trainer arguments go in, callbacks are copied, results come out elsewhere."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_trainer

from lightning_memsave import MemoryProfiler, last_report

from .harness import NAMESPACES, assert_equal, assert_same_state, outcome, plain, run
from .kinds import KINDS, build
from .methods import EXACT, METHODS, Counted, make
from .tasks import NUM_BATCHES


class Project:
    """A forecasting library's model: it copies its arguments and builds a Trainer of its own at every fit."""

    def __init__(self, kind: str, namespace: str, trainer_kwargs: dict[str, Any]) -> None:
        self.kind, self.namespace, self.trainer_kwargs = kind, namespace, copy.deepcopy(trainer_kwargs)

    def fit(self) -> Project:
        self.module = build(self.kind, self.namespace)
        torch.manual_seed(1)
        arguments = {"max_epochs": 2, **KINDS[self.kind].trainer, **self.trainer_kwargs}
        trainer = make_trainer(importlib.import_module(self.namespace), **arguments)
        trainer.fit(self.module, KINDS[self.kind].batches())
        self.outcome = outcome(self.module, trainer)
        return self


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", EXACT)
def test_a_project_that_takes_only_trainer_arguments(name: str, namespace: str) -> None:
    callbacks = [make(name, "forecasting")]
    project = Project("forecasting", namespace, {"callbacks": callbacks}).fit()
    assert_equal(project.outcome, plain("forecasting", namespace))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, _pickled])
@pytest.mark.parametrize("name", METHODS)
def test_a_copied_callback_does_what_the_original_does(name: str, duplicate: Callable[[Any], Any]) -> None:
    original = make(name, "language")
    twin = duplicate(original)
    assert type(twin) is type(original)
    assert repr(twin) == repr(original)
    found, expected = run("language", [twin]), run("language", [original])
    assert found.losses == expected.losses
    assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("name", METHODS)
def test_a_used_callback_can_still_be_copied_and_pickled(name: str) -> None:
    callback = make(name, "language")
    before = dict(vars(callback))
    run("language", [callback])
    assert vars(callback) == before, "a callback holds configuration only; run state belongs to the session"
    assert repr(_pickled(copy.deepcopy(callback))) == repr(callback)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_folds_with_one_list_of_callbacks(namespace: str) -> None:
    callbacks = [make(name, "tabular") for name in EXACT] + [Counted(["layers.?"], name="fold")]
    Counted.applied.clear()
    for _ in range(3):
        found = run("tabular", callbacks, namespace=namespace)
        assert_equal(found, plain("tabular", namespace))
    assert Counted.applied == ["fold"] * 3


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_report_of_a_hidden_trainer_can_be_read(namespace: str, tmp_path: Path) -> None:
    profiler = MemoryProfiler(steps=(1,), formats=("json",))
    Project("language", namespace, {"callbacks": [profiler], "default_root_dir": str(tmp_path)}).fit()
    report = last_report()
    assert report is not None
    weights = sum(v.numel() * v.element_size() for v in plain("language", namespace).state.values())
    assert report.by_category["weights"] == weights
    assert report.peak_bytes == sum(report.by_category.values())
    written = json.loads((tmp_path / "memsave" / "memory.json").read_text())
    assert written["peak_bytes"] == report.peak_bytes


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_callbacks_of_the_module_itself_are_found(namespace: str) -> None:
    module = build("tabular", namespace)
    module.configure_callbacks = lambda: [make(name, "tabular") for name in EXACT]
    trainer = make_trainer(importlib.import_module(namespace), max_epochs=2)
    torch.manual_seed(1)
    trainer.fit(module, KINDS["tabular"].batches())
    assert tuple(module.losses) == plain("tabular", namespace).losses
    assert_same_state(module.state_dict(), plain("tabular", namespace).state)
    assert trainer.global_step == 2 * NUM_BATCHES
