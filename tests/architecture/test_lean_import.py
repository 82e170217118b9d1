"""Importing the package starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "bitsandbytes", "datasets", "deepspeed", "flash_attn", "liger_kernel", "matplotlib", "peft", "pyarrow", "rich",
    "safetensors", "torchao", "transformers", "triton",
}  # fmt: skip


def modules_after(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_importing_the_package_imports_neither_torch_nor_lightning() -> None:
    found = modules_after("import lightning_memsave; dir(lightning_memsave); lightning_memsave.__version__")
    assert not found & (HEAVY | {"torch", "lightning", "pytorch_lightning", "numpy"})


def test_the_environment_factory_costs_nothing_without_the_variable() -> None:
    found = modules_after(
        "from lightning_memsave.callbacks.environment import callbacks_from_environment as c; assert c() == []"
    )
    assert not found & (HEAVY | {"torch", "lightning", "pytorch_lightning"})


@pytest.mark.parametrize("floor", ["memory.tracker", "transforms._pass", "planner.catalog", "planner.compatibility"])
def test_floors_below_the_shells_do_not_import_lightning(floor: str) -> None:
    found = modules_after(f"import lightning_memsave.{floor}")
    assert not found & {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_building_every_callback_imports_no_optional_library() -> None:
    # torch and Lightning bring some of the heavy ones themselves: compare with a process that has only those.
    base = modules_after("import torch, lightning.pytorch, pytorch_lightning")
    ours = modules_after(
        "import torch, lightning.pytorch, pytorch_lightning\n"
        "import lightning_memsave as m\n"
        "from lightning_memsave.planner.catalog import CATALOG\n"
        "for row in CATALOG: getattr(m, row.name)(**row.init_args)"
    )
    assert not (ours - base) & HEAVY


def test_importing_starts_no_accelerator() -> None:
    code = (
        "import torch, lightning_memsave as m\n[getattr(m, n) for n in m.__all__]\n"
        "assert not torch.cuda.is_initialized()"
    )
    modules_after(code)
