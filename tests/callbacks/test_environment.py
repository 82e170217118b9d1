"""``LIGHTNING_MEMSAVE``: savers for a project whose code cannot be touched."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import ActivationCheckpointing, ConfigurationError, EarlyZeroGrad, LowMemoryOptimizer
from lightning_memsave.callbacks import _callback_list
from lightning_memsave.callbacks.environment import callbacks_from_environment, fabric_callbacks_from_environment

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
OVERLAY = """
trainer:
  callbacks+:
    - class_path: lightning_memsave.ActivationCheckpointing
      init_args: {policy: every_n, every_n: 2}
    - class_path: lightning_memsave.EarlyZeroGrad
"""


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set the variable for this test only."""
    with monkeypatch.context() as patch:
        yield lambda value: patch.setenv("LIGHTNING_MEMSAVE", value)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines this package prints."""
    logger, said = logging.getLogger("lightning_memsave"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def names(trainer: Any) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callbacks]


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "methods.yaml").write_text(text)
    return str(tmp_path / "methods.yaml")


def test_without_the_variable_nothing_is_attached() -> None:
    assert callbacks_from_environment() == []
    assert fabric_callbacks_from_environment() == []
    assert not any("memsave" in type(c).__module__ for c in make_trainer().callbacks)


def test_without_the_variable_it_costs_no_import() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from lightning_memsave.callbacks.environment import callbacks_from_environment\n"
        "assert callbacks_from_environment() == []\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["lightning_memsave"]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_preset_is_attached_to_the_trainer_of_either_namespace(
    namespace: str, variable: Any, lines: list[str]
) -> None:
    variable("basic")
    trainer = make_trainer(importlib.import_module(namespace))
    assert {"EarlyZeroGrad", "AllocatorSettings", "ActivationCheckpointing"} <= set(names(trainer))
    assert lines == [
        "[memsave] LIGHTNING_MEMSAVE=basic: attaching EarlyZeroGrad(), AllocatorSettings(), ActivationCheckpointing()"
    ]


def test_the_attached_savers_work(variable: Any, lines: list[str]) -> None:
    plain, saved = LitLM(), LitLM()
    make_trainer().fit(plain, make_loader())
    variable("basic")
    make_trainer().fit(saved, make_loader())
    assert saved.losses == plain.losses
    assert any("ActivationCheckpointing: " in line for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        OVERLAY,
        OVERLAY.replace("callbacks+", "callbacks"),
        "- {class_path: lightning_memsave.ActivationCheckpointing, init_args: {policy: every_n, every_n: 2}}\n"
        "- lightning_memsave.EarlyZeroGrad\n",
    ],
)
@pytest.mark.parametrize("typed", [True, False])
def test_a_yaml_file_is_a_list_or_a_cli_overlay(
    text: str, typed: bool, variable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_callback_list, "is_available", lambda name: typed)
    variable(write(tmp_path, text))
    checkpointing, zero_grad = callbacks_from_environment()[1:]
    assert repr(checkpointing) == "ActivationCheckpointing(policy='every_n')"
    assert isinstance(zero_grad, EarlyZeroGrad)


def test_callbacks_of_lightning_may_stand_in_the_file(variable: Any, tmp_path: Path) -> None:
    variable(write(tmp_path, "- class_path: lightning.pytorch.callbacks.Timer\n  init_args: {duration: '00:01:00:00'}"))
    assert "Timer" in names(make_trainer())


WRONG = {
    "a typo in a class": (
        "- class_path: lightning_memsave.QLora",
        r"callback 1 \(lightning_memsave.QLora\): it cannot be imported .* Did you mean 'lightning_memsave.QLoRA'",
    ),
    "a bare class": ("- class_path: QLoRA", r"not a dotted path. Did you mean 'lightning_memsave.QLoRA'"),
    "a typo in an argument": (
        "- {class_path: lightning_memsave.QLoRA, init_args: {rnak: 8}}",
        r"no argument 'rnak'. Did you mean 'rank'\? Its arguments are rank, ",
    ),
    "a wrong value": (
        "- {class_path: lightning_memsave.ActivationCheckpointing, init_args: {policy: sometimes}}",
        r"callback 1 \(lightning_memsave.ActivationCheckpointing\): .*sometimes",
    ),
    "a wrong key": ("- {class_path: lightning_memsave.QLoRA, init_arg: {}}", "keys 'init_arg'; only class_path and"),
    "arguments that are no mapping": ("- {class_path: lightning_memsave.QLoRA, init_args: [8]}", r"init_args is \[8\]"),
    "something that is no callback": ("- class_path: torch.nn.Linear", "it is not a Lightning callback"),
    "a precision plugin": (
        "- class_path: lightning_memsave.BF16Precision",
        r"it is not a Lightning callback. Move it to trainer.plugins of the project's own configuration",
    ),
    "an entry without a class": ("- {init_args: {}}", "Write class_path: lightning_memsave.NAME"),
    "an empty file": ("", "expected a list of"),
    "an empty list": ("[]", "expected a list of"),
    "no list of callbacks": ("model: {}", "has 'model' and no list of callbacks"),
    "more than callbacks": (
        "seed_everything: 1\ntrainer: {callbacks: [], precision: bf16-mixed}",
        "also sets 'seed_everything', 'trainer.precision'",
    ),
    "no YAML": ("- {", "cannot be read as YAML"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("typed", [True, False])
def test_a_wrong_file_names_the_variable_the_file_and_the_way_out(
    case: str, typed: bool, variable: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = WRONG[case]
    monkeypatch.setattr(_callback_list, "is_available", lambda name: typed)
    path = write(tmp_path, text)
    variable(path)
    with pytest.raises(ConfigurationError, match=message) as error:
        make_trainer()
    assert str(error.value).startswith(f"LIGHTNING_MEMSAVE={path}:")


def test_all_wrong_entries_are_listed_at_once(variable: Any, tmp_path: Path) -> None:
    variable(write(tmp_path, "- class_path: a.B\n- class_path: c.D\n"))
    with pytest.raises(ConfigurationError, match=r"(?s)callback 1 \(a.B\).*callback 2 \(c.D\)"):
        make_trainer()


@pytest.mark.parametrize("value", ["qlroa", "no/such.yaml", "0"])
def test_a_value_that_is_neither_preset_nor_file_says_so(value: str, variable: Any) -> None:
    variable(value)
    with pytest.raises(ConfigurationError, match=f"LIGHTNING_MEMSAVE='{value}' is neither a preset nor a file in"):
        make_trainer()


# -- beside the project's own callbacks ---------------------------------------------------------------------------
def fitted(own: list[Any], module: Any = None) -> Any:
    trainer = make_trainer(callbacks=own)
    trainer.fit(module or LitLM(), make_loader())
    return trainer


def test_the_same_saver_twice_is_one(variable: Any, lines: list[str]) -> None:
    variable("basic")
    own = ActivationCheckpointing()
    trainer = fitted([own])
    assert [c for c in trainer.callbacks if isinstance(c, ActivationCheckpointing)] == [own]
    assert not any("instead of" in line for line in lines)


def test_the_trainers_own_saver_wins_and_the_line_says_so(variable: Any, lines: list[str]) -> None:
    variable("full_finetune")
    own = LowMemoryOptimizer("lion_8bit")
    trainer = fitted([own])
    assert [c for c in trainer.callbacks if isinstance(c, LowMemoryOptimizer)] == [own]
    assert (
        "[memsave] LIGHTNING_MEMSAVE: the Trainer's own LowMemoryOptimizer(name='lion_8bit') is used "
        "instead of LowMemoryOptimizer()"
    ) in [line.replace("name='adamw_8bit'", "") for line in lines]


def test_the_modules_own_saver_wins_too(variable: Any) -> None:
    class WithCallbacks(LitLM):
        def configure_callbacks(self) -> list[Any]:
            return [own]

    variable("basic")
    own = ActivationCheckpointing(policy="every_n")
    trainer = fitted([], WithCallbacks())
    assert [c for c in trainer.callbacks if isinstance(c, ActivationCheckpointing)] == [own]


def test_a_saver_that_may_stand_twice_in_the_file_stays_twice(variable: Any, tmp_path: Path) -> None:
    entry = "- {class_path: lightning_memsave.ActivationCheckpointing, init_args: {modules: net.blocks.%d}}\n"
    variable(write(tmp_path, entry % 0 + entry % 1))
    for trainer in (fitted([]), fitted([])):
        assert names(trainer).count("ActivationCheckpointing") == 2


def test_one_list_of_callbacks_for_several_trainers_does_not_pile_up(variable: Any) -> None:
    variable("basic")
    shared = [LowMemoryOptimizer()]
    for _ in range(3):
        trainer = fitted(shared)
        assert names(trainer).count("ActivationCheckpointing") == 1


def test_a_conflict_with_the_projects_own_saver_is_refused_before_the_model_is_touched(variable: Any) -> None:
    from lightning_memsave import IncompatibleMethodsError, LoRA

    variable("qlora")
    module = LitLM()
    with pytest.raises(IncompatibleMethodsError, match="LoRA and QLoRA do not combine"):
        fitted([LoRA(rank=2)], module)
    assert type(module.net.blocks[0].q_proj) is nn.Linear


def test_the_attached_callbacks_copy_and_pickle(variable: Any) -> None:
    variable("basic")
    trainer = make_trainer()
    assert [type(c) for c in copy.deepcopy(trainer.callbacks)] == [type(c) for c in trainer.callbacks]
    assert [type(c) for c in pickle.loads(pickle.dumps(trainer.callbacks))] == [type(c) for c in trainer.callbacks]


# -- Fabric -------------------------------------------------------------------------------------------------------
def test_fabric_gets_what_changes_no_parameter(variable: Any, lines: list[str]) -> None:
    from lightning.fabric import Fabric

    variable("basic")
    fabric = Fabric(accelerator="cpu", devices=1)
    net = LitLM().net
    module, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert any("recompute" in line for line in lines), lines
    module(torch.zeros(2, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert "EarlyZeroGrad(), AllocatorSettings() need a Trainer's loop" in lines[0]


def test_fabric_refuses_what_comes_too_late(variable: Any) -> None:
    from lightning.fabric import Fabric

    variable("qlora")
    fabric = Fabric(accelerator="cpu", devices=1)
    net = LitLM().net
    with pytest.raises(ConfigurationError, match=r"LIGHTNING_MEMSAVE=qlora: QLoRA\(\) changes parameters.*apply\("):
        fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
