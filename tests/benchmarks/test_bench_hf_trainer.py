"""The benchmark beside HF Trainer keeps what it measured and writes a page of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).with_name("bench_hf_trainer.py")
    spec = importlib.util.spec_from_file_location("bench_hf_trainer", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fake(seconds: float, rss: int) -> dict[str, Any]:
    return {"losses": [2.5, 2.25], "step_seconds": seconds, "peak_rss_bytes": rss, "tracked_peak_bytes": rss // 2}


@pytest.fixture
def measured(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the processes; return the list of what was asked for."""
    asked: list[str] = []

    def measure(pair: Any, args: Any) -> dict[str, Any]:
        asked.append(pair.key)
        return {"ours": fake(1.0 + len(asked), 10**9), "hf": fake(2.0, 2 * 10**9)}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "library", lambda name: "")
    return asked


def test_every_pair_is_repeated_and_tensor_bytes_are_counted_once(
    bench: ModuleType, measured: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "rows.json"
    bench.main(["--methods", "lora", "--repetitions", "2", "--output", str(output)])
    assert (
        measured.count("lora/glibc") == measured.count("lora/tcmalloc") == measured.count("lora/glibc/trim=1GiB") == 2
    )
    assert measured.count("lora/tracked") == 1
    assert {key: len(entry["runs"]) for key, entry in json.loads(output.read_text()).items()} == {
        "lora/glibc": 2,
        "lora/tcmalloc": 2,
        "lora/glibc/trim=1GiB": 2,
        "lora/tracked": 1,
    }


def test_what_was_measured_is_not_measured_again(bench: ModuleType, measured: list[str], tmp_path: Path) -> None:
    arguments = ["--methods", "lora", "--output", str(tmp_path / "rows.json"), "--repetitions"]
    bench.main([*arguments, "1"])
    first = len(measured)
    bench.main([*arguments, "1"])
    assert len(measured) == first
    bench.main([*arguments, "2"])
    assert len(measured) == first + 3


def test_the_page_has_medians_ratios_losses_and_where_they_come_from(
    bench: ModuleType, measured: list[str], tmp_path: Path
) -> None:
    bench.main(["--methods", "lora", "--repetitions", "3", "--output", str(tmp_path / "rows.json")])
    page = (tmp_path / "rows.md").read_text()
    row = next(line for line in page.splitlines() if "| tcmalloc | 3 |" in line)
    assert "| 1000 | 2000 | 0.50 |" in row
    assert "2.5000, 2.2500" in row
    assert "| LoRA r=8 on all linears, checkpointing | 500 | 1000 | 0.50 |" in page
    for part in ("cpu:", "torch ", "commit:", "--methods lora"):
        assert part in page


def test_a_missing_allocator_names_its_package(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "FOLDERS", (str(tmp_path),))
    with pytest.raises(SystemExit, match=r"tcmalloc.*apt-get install libtcmalloc-minimal4"):
        bench.main(["--output", str(tmp_path / "rows.json")])
