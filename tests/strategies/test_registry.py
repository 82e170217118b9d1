"""The names of strategies are known wherever something of this package is, and under ``memsave run``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_memsave
from lightning_memsave.callbacks._lightning import NAMESPACES, strategy_kind
from lightning_memsave.planner.catalog import CATALOG
from lightning_memsave.planner.compatibility import STRATEGIES
from lightning_memsave.strategies._registry import NAMES, as_memsave_run, register_names

SCRIPT = """
import sys
import torch
import {namespace} as pl
{imports}
from {namespace}.demos.boring_classes import BoringModel

class Tell(pl.Callback):
    def on_fit_end(self, trainer, module):
        weights = [float(p.double().sum()) for p in module.parameters()]
        open(f"rank-{{trainer.global_rank}}.txt", "w").write(
            repr([type(trainer.strategy).__name__, weights, sys.argv[1:]])
        )

if __name__ == "__main__":
    torch.manual_seed(int(__import__("os").environ.get("LOCAL_RANK", 0)))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="memsave_ddp", max_epochs=1, limit_train_batches=3, limit_val_batches=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Tell()],
    )
    trainer.fit(BoringModel())
"""


def run_script(*command: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return [Path(f"rank-{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_a_script_that_imports_the_package_trains_on_two_processes(namespace: str) -> None:
    Path("train.py").write_text(
        SCRIPT.format(namespace=namespace, imports="from lightning_memsave import EarlyZeroGrad")
    )
    first, second = run_script("train.py", "--lr", "1")
    assert first == second
    assert first.startswith("['BlockDDPStrategy', [")
    assert first.endswith("['--lr', '1']]")


def test_under_memsave_run_a_script_that_knows_nothing_of_us_does_too() -> None:
    Path("train.py").write_text(SCRIPT.format(namespace="lightning.pytorch", imports=""))
    first, second = run_script("-m", "lightning_memsave", "run", "train.py", "--lr", "1", MASTER_PORT="29871")
    assert first == second
    assert first.startswith("['BlockDDPStrategy', [")
    assert first.endswith("['--lr', '1']]")


def test_every_name_makes_a_strategy_of_the_catalog_in_both_namespaces() -> None:
    strategies = {row.name for row in CATALOG if row.slot == "strategy"}
    for name, entry in NAMES.items():
        assert entry.strategy in strategies
        for namespace in NAMESPACES:
            registry = importlib.import_module(f"{namespace.__name__}.strategies").StrategyRegistry
            register_names(registry)  # again: nothing changes
            assert registry[name]["description"] == entry.about
            made = registry.get(name)
            assert type(made) is getattr(lightning_memsave, entry.strategy)
            assert strategy_kind(made) in STRATEGIES


def test_processes_are_started_through_memsave_run_only_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    from lightning_memsave.strategies import _registry

    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1"])
    with as_memsave_run():
        assert "run" not in _basic_subprocess_cmd()
    monkeypatch.setattr(_registry, "_relaunch", ["run", "/somewhere/train.py"])
    with as_memsave_run():
        assert list(_basic_subprocess_cmd())[1:] == [
            "-m",
            "lightning_memsave",
            "run",
            "/somewhere/train.py",
            "--lr",
            "1",
        ]
    assert sys.argv == ["train.py", "--lr", "1"]
