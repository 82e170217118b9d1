"""Fixtures every test may use, and a check that no test leaves something behind."""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning.pytorch  # noqa: F401  (sets an environment variable at import, which is no test's leak)
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

torch.set_num_threads(1)
for _name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs hardware that is not here, with the reason."""
    devices = torch.cuda.device_count()
    for item in items:
        for marker, need in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and devices < need:
                item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA device(s), found {devices}"))


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder and fail a test that leaves process state changed."""
    monkeypatch.chdir(tmp_path)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    changed = {
        key
        for key in set(environment) | set(os.environ)
        if environment.get(key) != os.environ.get(key) and not key.startswith(("PYTEST_", "KINETO_", "TORCHINDUCTOR_"))
    }
    os.environ.clear()
    os.environ.update(environment)
    leaks = []
    # Lightning itself leaves these three
    if changed - {"MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"}:
        leaks.append(f"environment variables {sorted(changed)}")
    if torch.get_default_dtype() != dtype:
        leaks.append(f"default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(dtype)
    if dist.is_available() and dist.is_initialized():
        leaks.append("a process group")
        dist.destroy_process_group()
    if torch.are_deterministic_algorithms_enabled():
        leaks.append("deterministic algorithms")
        torch.use_deterministic_algorithms(False)
    if torch._C._len_torch_dispatch_stack():
        leaks.append("a torch dispatch mode")
    if not torch.is_grad_enabled():
        leaks.append("disabled gradients")
        torch.set_grad_enabled(True)
    assert not leaks, f"the test left behind: {', '.join(leaks)}"
    _collect()


_frozen_modules = 0


def _collect() -> None:
    """Free the test's cycles. Imported code is frozen out of the collector: 0.01 s a test instead of 0.25 s."""
    global _frozen_modules
    gc.collect()
    if len(sys.modules) > _frozen_modules + 50:
        _frozen_modules = len(sys.modules)
        gc.freeze()


def _rank_main(
    rank: int, world_size: int, folder: str, function: Callable[..., object], args: tuple[object, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result = function(rank, *args)
        torch.save(result, os.path.join(folder, f"result-{rank}.pt"))
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[object]]:
    """Run ``function(rank, *args)`` on gloo processes and return what each rank returned.

    The processes are forked (0.8 s instead of 24 s for spawned ones), which works as long as CUDA is not initialised
    here. A Trainer inside finds the process group already made and uses it: pass ``devices=2`` and a strategy.
    """

    def run(function: Callable[..., object], *args: object, world_size: int = 2) -> list[object]:
        folder = tmp_path / f"ranks-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        try:
            mp.start_processes(
                _rank_main, (world_size, str(folder), function, args), nprocs=world_size, start_method="fork"
            )
        except Exception as error:
            texts = [p.read_text() for p in sorted(folder.glob("error-*.txt"))]
            raise AssertionError("\n".join(texts) or str(error)) from None
        return [torch.load(folder / f"result-{r}.pt", weights_only=False) for r in range(world_size)]

    return run
