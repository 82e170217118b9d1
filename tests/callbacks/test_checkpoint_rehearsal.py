"""CheckpointRehearsal: what cannot be resumed fails in the first step, and what can goes on as if nothing had been."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_memsave import (
    BlockDDPStrategy,
    CheckpointMismatchError,
    CheckpointRehearsal,
    EarlyZeroGrad,
    GradientRelease,
    LoRA,
    LowMemoryOptimizer,
    QLoRA,
)
from lightning_memsave.callbacks import _rehearsal_run
from lightning_memsave.callbacks._session import Session

Run = Callable[..., list[Any]]


def fit(*callbacks: Any, module: Any = None, namespace: Any = pl, **options: Any) -> tuple[Any, Any]:
    module = LitLM(dropout=0.1) if module is None else module
    trainer = make_trainer(
        namespace, callbacks=[*callbacks], **{"max_epochs": 2, "enable_checkpointing": True, **options}
    )
    torch.manual_seed(1)
    trainer.fit(module, make_loader())
    return module, trainer


def states(trainer: Any) -> list[Tensor]:
    return [
        getattr(v, "full_tensor", v.clone)()
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor)
    ]


def same(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    a, b = first[0].state_dict(), second[0].state_dict()
    equal = [torch.equal(a[k], b[k]) for k in b if isinstance(b[k], Tensor)]
    equal += [torch.equal(x, y) for x, y in zip(states(first[1]), states(second[1]), strict=True)]
    return all(equal) and list(a) == list(b) and first[0].losses == second[0].losses


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []

    def report(self: Any, name: str, line: str, *, warning: bool = False) -> None:
        if name == "CheckpointRehearsal":
            found.append((line, warning))

    monkeypatch.setattr(Session, "report", report)
    return found


SAVERS: dict[str, Callable[[], list[Any]]] = {
    "AdamW": list,
    "adamw_8bit": lambda: [LowMemoryOptimizer("adamw_8bit")],
    "adafactor": lambda: [LowMemoryOptimizer("adafactor")],
    "LoRA": lambda: [LoRA(rank=4)],
    "QLoRA": lambda: [QLoRA(rank=4)],
    "GradientRelease, 8-bit": lambda: [GradientRelease(), LowMemoryOptimizer("adamw_8bit"), EarlyZeroGrad()],
}


@pytest.mark.parametrize("savers", SAVERS)
def test_the_run_goes_on_with_every_bit_as_it_was(savers: str, lines: list[tuple[str, bool]]) -> None:
    plain, rehearsed = fit(*SAVERS[savers]()), fit(*SAVERS[savers](), CheckpointRehearsal())
    assert same(rehearsed, plain)
    assert len(lines) == 1
    assert "was written, read, compared bit by bit and loaded back in" in lines[0][0]
    assert [p.name for p in Path.cwd().rglob("*") if "rehears" in p.name] == [], "its files are gone"


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_it_works_in_both_namespaces_once_a_run(name: str, lines: list[tuple[str, bool]]) -> None:
    namespace = importlib.import_module(name)
    callback = CheckpointRehearsal()
    for _ in range(2):
        make_trainer(namespace, callbacks=[callback], enable_checkpointing=True, max_steps=3).fit(
            importlib.import_module(f"{name}.demos.boring_classes").BoringModel()
        )
    assert len(lines) == 2


def test_it_waits_for_the_first_step_of_an_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = _rehearsal_run.Rehearsal.run

    def run(self: Any) -> Any:
        seen.append((self.trainer.global_step, self.trainer.fit_loop.batch_idx))
        return original(self)

    monkeypatch.setattr(_rehearsal_run.Rehearsal, "run", run)
    fit(CheckpointRehearsal(), accumulate_grad_batches=2)
    assert seen == [(1, 1)]


def test_a_resumed_run_is_rehearsed_after_its_own_first_step(lines: list[tuple[str, bool]], tmp_path: Path) -> None:
    _, trainer = fit(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = LitLM(dropout=0.1)
    trainer = make_trainer(callbacks=[CheckpointRehearsal()], max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"enable_checkpointing": False}, "enable_checkpointing=False"), ({"fast_dev_run": True}, "fast_dev_run")],
)
def test_it_says_that_it_skips_where_no_checkpoint_is_written(
    options: dict[str, Any], reason: str, lines: list[tuple[str, bool]]
) -> None:
    fit(CheckpointRehearsal(), **options)
    assert len(lines) == 1
    assert lines[0][0].startswith("skipped: ")
    assert reason in lines[0][0]


# -- what is found -----------------------------------------------------------------------------------------------------
class Broken(torch.optim.AdamW):
    """AdamW with one thing wrong."""

    def __init__(self, *args: Any, wrong: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.wrong = wrong

    def state_dict(self) -> Any:
        if self.wrong == "no state_dict":
            raise KeyError("state1")
        state = super().state_dict()
        if self.wrong == "a lambda":
            state["schedule"] = lambda step: step
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        if self.wrong == "no load":
            raise ValueError("Callable map_location not supported")
        super().load_state_dict(state_dict)
        if self.wrong == "a cast":
            for state in self.state.values():
                state["exp_avg"] = state["exp_avg"].bfloat16()
        elif self.wrong == "a value":
            for state in self.state.values():
                state["exp_avg_sq"] += 1e-3


class WithBroken(LitLM):
    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong

    def configure_optimizers(self) -> Any:
        return Broken(self.parameters(), lr=1e-3, wrong=self.wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("no state_dict", r"cannot be saved: the state of Broken \(optimizer 0\): KeyError: 'state1'"),
        ("a lambda", r"cannot be saved: checkpoint\['optimizer_states'\]"),
        ("no load", r"optimizer_states\[0\] cannot be loaded by Broken: ValueError: Callable map_location"),
        ("a cast", r"state.0.exp_avg \(net.embedding.weight\) was float32 \[64, 64\] and is bfloat16 \[64, 64\]"),
        ("a value", r"state.0.exp_avg_sq \(net.embedding.weight\) has other values"),
    ],
)
def test_an_optimizer_that_would_not_come_back_fails_after_the_first_step(wrong: str, message: str) -> None:
    module = WithBroken(wrong)
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        fit(CheckpointRehearsal(), module=module)
    assert len(module.losses) == 1
    assert "tried after step 1, nothing is lost" in str(caught.value)
    assert list(Path.cwd().rglob("*rehears*")) == []


class Forgetful(TorchCheckpointIO):
    """Writes half precision."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        halved = {k: v.bfloat16().float() for k, v in checkpoint["state_dict"].items()}
        super().save_checkpoint({**checkpoint, "state_dict": halved}, path, storage_options)


def test_a_file_with_other_weights_than_those_that_were_written_is_named() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"state_dict\.net\.embedding\.weight has other values"):
        fit(CheckpointRehearsal(), plugins=[Forgetful()])


class Strict(LitLM):
    """Saves an entry that its own loader does not know."""

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(lambda module, state, prefix, meta: state.update(extra=torch.zeros(2)))


def test_a_module_that_cannot_load_what_it_saves_is_named() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"(?s)state_dict cannot be loaded by Strict.*Unexpected key"):
        fit(CheckpointRehearsal(), module=Strict())


def test_a_full_disk_is_found_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rehearsal_run.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointMismatchError, match=r"a checkpoint holds about 1\.2\d MiB, and .* has 1000 B"):
        fit(CheckpointRehearsal())


class Settings:
    """An object that is neither a tensor nor plain data."""


class WithObject(LitLM):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = Settings()


def test_objects_that_weights_only_refuses_are_a_warning(lines: list[tuple[str, bool]]) -> None:
    fit(CheckpointRehearsal(), module=WithObject())
    assert [warning for _, warning in lines] == [True, False]
    assert "weights_only=False" in lines[0][0]
    assert "Settings" in lines[0][0]


class Averaged(pl.Callback):
    """Puts other weights than the module's into every checkpoint, as averaging callbacks do."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v + 1 for k, v in checkpoint["state_dict"].items()}


def test_weights_that_are_not_the_modules_are_not_loaded_into_it(lines: list[tuple[str, bool]]) -> None:
    plain, rehearsed = fit(), fit(Averaged(), CheckpointRehearsal())
    assert same(rehearsed, plain)
    assert "not those of the module: not loaded back" in lines[0][0]


def test_an_asynchronous_writer_is_waited_for(lines: list[tuple[str, bool]]) -> None:
    assert same(fit(CheckpointRehearsal(), plugins=[AsyncCheckpointIO()]), fit())
    assert "loaded back" in lines[0][0]


def test_weights_only_checkpoints_are_rehearsed_as_such(lines: list[tuple[str, bool]]) -> None:
    saver = ModelCheckpoint("weights", save_weights_only=True)
    fit(saver, CheckpointRehearsal(), module=WithBroken("no state_dict"))
    assert "loaded back" in lines[0][0]


# -- two processes -----------------------------------------------------------------------------------------------------
class Sharded(LitLM):
    """Shards itself."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self._build()
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _strategy(name: str) -> Any:
    if name.startswith("fsdp2"):
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=name == "fsdp2 distributed")
    return BlockDDPStrategy(bucket_size="20kB") if name == "memsave_ddp" else name


def _two(rank: int, folder: str, names: list[str]) -> dict[str, bool]:
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        runs = []
        for rehearsal in ([], [CheckpointRehearsal()]):
            module = Sharded("configure_model") if name.startswith("fsdp2") else LitLM(dropout=0.1)
            optimizer = [] if "full" in name else [LowMemoryOptimizer("adamw_8bit")]
            runs.append(
                fit(*optimizer, *rehearsal, module=module, strategy=_strategy(name), devices=2, default_root_dir=folder)
            )
            runs[-1][0].losses = [float(x) for x in runs[-1][0].losses]
        found[name] = _same_shards(runs[1], runs[0])
    return found


def _same_shards(first: tuple[Any, Any], second: tuple[Any, Any]) -> bool:
    def shards(module: nn.Module) -> list[Tensor]:
        return [getattr(p, "_local_tensor", p) for p in module.parameters()]

    equal = [torch.equal(a, b) for a, b in zip(shards(first[0]), shards(second[0]), strict=True)]
    return all(equal) and first[0].losses == second[0].losses


def test_under_ddp_and_fsdp2_the_run_goes_on_as_it_was(ranks: Run, tmp_path: Path) -> None:
    names = ["ddp", "memsave_ddp", "fsdp2 distributed", "fsdp2 full"]
    assert ranks(_two, str(tmp_path / "run"), names) == [dict.fromkeys(names, True)] * 2
    assert list(tmp_path.rglob("*rehears*")) == []


def _broken(rank: int, folder: str, strategy: str) -> str:
    warnings.simplefilter("ignore")
    module = WithBroken("a value" if rank == 0 else "")
    with pytest.raises(CheckpointMismatchError) as caught:
        fit(CheckpointRehearsal(), module=module, strategy=_strategy(strategy), devices=2, default_root_dir=folder)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp", "memsave_ddp"])
def test_what_rank_zero_finds_ends_the_run_on_every_rank(strategy: str, ranks: Run, tmp_path: Path) -> None:
    first, second = ranks(_broken, str(tmp_path / "run"), strategy)
    assert first == second
    assert "state.0.exp_avg_sq (net.embedding.weight) has other values" in first


class ShardedBroken(Sharded):
    def configure_optimizers(self) -> Any:
        return Broken(self.parameters(), lr=1e-3, wrong="a value")


def _sharded_broken(rank: int, folder: str) -> str:
    warnings.simplefilter("ignore")
    with pytest.raises(CheckpointMismatchError) as caught:
        fit(
            CheckpointRehearsal(),
            module=ShardedBroken("configure_model"),
            strategy=_strategy("fsdp2 distributed"),
            devices=2,
            default_root_dir=folder,
        )
    return str(caught.value)


def test_a_sharded_state_that_comes_back_different_is_named(ranks: Run, tmp_path: Path) -> None:
    first, second = ranks(_sharded_broken, str(tmp_path / "run"))
    assert first == second
    assert "exp_avg_sq of net.embedding.weight in optimizer 0 has other values after loading" in first
