"""Measure one row in this process; ``bench_suite`` starts one process for each row."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from gpu.bench.machine import measured_on
from gpu.bench.meter import Meter
from gpu.bench.rows import Row, row

__all__ = ["main", "measure"]

OUT_OF_MEMORY = ("out of memory", "cudaerrormemoryallocation", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the device is full, whoever raised it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, (RuntimeError, MemoryError)) and any(t in str(error).lower() for t in OUT_OF_MEMORY)


def measure(chosen: Row, device: str, scratch: Path) -> dict[str, Any]:
    """Train one row and return its result; running out of memory is a result too."""
    import torch

    meter = Meter(device, chosen.batch * chosen.tokens)
    status: dict[str, Any] = {"status": "ok"}
    try:
        importlib.import_module(f"gpu.bench.run_{chosen.framework}").train(chosen, meter, device, scratch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        status = {"status": "oom", "error": str(error).split("\n")[0][:300]}
    if device != "cpu":
        torch.cuda.synchronize()
    return {**status, **measured_on(device), **meter.report()}


def main(name: str, device: str, scratch: str, output: str) -> int:
    """Measure the row called ``name`` and write its result to ``output``."""
    result = measure(row(name), device, Path(scratch))
    Path(output).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
