"""A resumed run equals the run that was never interrupted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memsave import LoRA
from lightning_memsave.errors import MemsaveError

from .harness import NAMESPACES, assert_same_state, trainer_for
from .kinds import KINDS, build
from .methods import EXACT, METHODS, OTHERS, combinations, make

FIRST = "epoch=0.ckpt"
RESUME_KINDS = ("language", "vision", "manual", "hf_llama")  # no random draws, which a resumed run would repeat


def _train(
    kind: str, callbacks: list[Any], folder: Path, *, namespace: str = NAMESPACES[0], epochs: int = 2, **fit: Any
) -> Any:
    """Train and keep a checkpoint of every epoch."""
    torch.manual_seed(7)
    module = build(kind, namespace)
    callbacks = [*callbacks, _keep_epochs(namespace, folder)]
    trainer = trainer_for(kind, callbacks, namespace, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, KINDS[kind].batches(), **fit)
    return module


def _keep_epochs(namespace: str, folder: Path) -> Any:
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    return callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=True)


def _resume(kind: str, name: str, namespace: str, folder: Path) -> None:
    whole = _train(kind, [make(name, kind)], folder, namespace=namespace)
    path = folder / FIRST
    assert torch.load(path, weights_only=True)["epoch"] == 0
    resumed = _train(kind, [make(name, kind)], folder, namespace=namespace, ckpt_path=str(path))
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert_same_state(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_the_uninterrupted_run(name: str, namespace: str, tmp_path: Path) -> None:
    _resume("language", name, namespace, tmp_path)


@pytest.mark.parametrize(("name", "kind"), combinations(["ActivationCheckpointing", *OTHERS], RESUME_KINDS[1:]))
def test_other_kinds_resume_too(name: str, kind: str, tmp_path: Path) -> None:
    _resume(kind, name, NAMESPACES[0], tmp_path)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "AdapterCheckpoint"])
def test_a_checkpoint_of_an_exact_method_is_one_without_it(name: str, tmp_path: Path) -> None:
    # a project may drop the saver later, or add it to a checkpoint it already has
    _train("language", [make(name, "language")], tmp_path, epochs=1)
    (tmp_path / FIRST).rename(tmp_path / "with.ckpt")
    whole = _train("language", [], tmp_path)
    dropped = _train("language", [], tmp_path, ckpt_path=str(tmp_path / "with.ckpt"))
    added = _train("language", [make(name, "language")], tmp_path, ckpt_path=str(tmp_path / FIRST))
    assert_same_state(dropped.state_dict(), whole.state_dict())
    assert_same_state(added.state_dict(), whole.state_dict())


def test_resume_with_another_rank_is_refused(tmp_path: Path) -> None:
    _train("language", [LoRA(rank=8)], tmp_path, epochs=1)
    with pytest.raises(MemsaveError, match="rank"):
        _train("language", [LoRA(rank=4)], tmp_path, ckpt_path=str(tmp_path / FIRST))
