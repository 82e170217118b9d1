"""A resumed run equals the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memsave.errors import MemsaveError

from .harness import NAMESPACES, assert_same_state, trainer_for
from .kinds import KINDS, build
from .methods import EXACT, METHODS, OTHERS, make

RESUME_KINDS = ("language", "vision", "manual", "hf_bert")


class SeedEachEpoch:
    """Seed at every epoch start, so that random draws do not depend on where the process began."""

    def __init__(self, module: Any) -> None:
        self.module, self.inner = module, module.on_train_epoch_start
        module.__dict__["on_train_epoch_start"] = self

    def __call__(self) -> None:
        torch.manual_seed(self.module.current_epoch)
        self.inner()


def _epochs(kind: str, callbacks: list[Any], namespace: str, max_epochs: int, ckpt_path: str | None = None) -> Any:
    torch.manual_seed(7)
    module = build(kind, namespace)
    SeedEachEpoch(module)
    trainer = trainer_for(kind, callbacks, namespace, max_epochs=max_epochs)
    trainer.fit(module, KINDS[kind].batches(), ckpt_path=ckpt_path)
    return module, trainer


def _resume(kind: str, name: str, namespace: str, folder: Path) -> None:
    _, trainer = _epochs(kind, [make(name, kind)], namespace, 1)
    path = str(folder / "epoch.ckpt")
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["epoch"] == 0
    resumed, _ = _epochs(kind, [make(name, kind)], namespace, 2, path)
    whole, _ = _epochs(kind, [make(name, kind)], namespace, 2)
    assert resumed.losses == whole.losses[len(whole.losses) // 2 :]
    assert_same_state(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_the_uninterrupted_run(name: str, namespace: str, tmp_path: Path) -> None:
    _resume("language", name, namespace, tmp_path)


@pytest.mark.parametrize("kind", [k for k in RESUME_KINDS if k != "language"])
@pytest.mark.parametrize("name", [n for n in METHODS if n in OTHERS or n == "ActivationCheckpointing"])
def test_other_kinds_resume_too(name: str, kind: str, tmp_path: Path) -> None:
    _resume(kind, name, NAMESPACES[0], tmp_path)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "AdapterCheckpoint"])
def test_a_checkpoint_of_an_exact_method_is_one_without_it(name: str, tmp_path: Path) -> None:
    # a project may drop the saver later, or add it to a checkpoint it already has
    _, trainer = _epochs("language", [make(name, "language")], NAMESPACES[0], 1)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    _, trainer = _epochs("language", [], NAMESPACES[0], 1)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    dropped, _ = _epochs("language", [], NAMESPACES[0], 2, str(tmp_path / "with.ckpt"))
    added, _ = _epochs("language", [make(name, "language")], NAMESPACES[0], 2, str(tmp_path / "without.ckpt"))
    whole, _ = _epochs("language", [], NAMESPACES[0], 2)
    assert_same_state(dropped.state_dict(), whole.state_dict())
    assert_same_state(added.state_dict(), whole.state_dict())


def test_resume_with_another_rank_is_refused(tmp_path: Path) -> None:
    from lightning_memsave import LoRA

    _, trainer = _epochs("language", [LoRA(rank=8)], NAMESPACES[0], 1)
    trainer.save_checkpoint(tmp_path / "rank8.ckpt")
    with pytest.raises(MemsaveError, match="rank"):
        _epochs("language", [LoRA(rank=4)], NAMESPACES[0], 2, str(tmp_path / "rank8.ckpt"))
