"""``memsave doctor``: every row is a value and a reason."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_memsave.cli import _checks
from lightning_memsave.cli.main import main
from lightning_memsave.planner.catalog import CATALOG
from lightning_memsave.planner.compatibility import METHOD_PAIRS, STRATEGIES, cell


@pytest.fixture(scope="module")
def rows() -> list[_checks.Row]:
    return _checks.all_rows()


def find(rows: list[_checks.Row], name: str) -> _checks.Row:
    return next(row for row in rows if row.name == name)


def test_json_holds_the_machine_and_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["group"] for row in report["machine"]} >= {"Software", "Accelerators", "Optional libraries", "Host"}
    assert [method["name"] for method in report["methods"]] == [row.name for row in CATALOG]
    for row, method in zip(CATALOG, report["methods"], strict=True):
        assert set(method["strategies"]) == (set() if row.slot == "strategy" else set(STRATEGIES))
        for kind, reason in method["strategies"].items():
            assert tuple(reason) == cell(method["name"], kind)
        for other, reason in method["refused_with"].items():
            assert reason == METHOD_PAIRS[frozenset({method["name"], other})]


def test_the_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(row.name in out for row in CATALOG if row.slot != "strategy"), "a method's name was cut"
    assert all(kind in out for kind in STRATEGIES), "a strategy's name was cut"


def test_installed_libraries_show_their_version(rows: list[_checks.Row]) -> None:
    for name in ("torch", "lightning", "pytorch_lightning", "peft", "bitsandbytes"):
        assert find(rows, name).value == importlib.metadata.version(name)


def test_a_missing_library_comes_with_its_pip_line_and_its_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "is_available", lambda name: name != "peft")
    row = find(_checks.all_rows(), "peft")
    assert row.status == "missing"
    assert 'pip install "lightning-memsave[peft]"' in row.note
    assert "LoRA" in row.note
    assert _checks.missing_for("LoRA") == ['pip install "lightning-memsave[peft]"']
    assert _checks.missing_for("EarlyZeroGrad") == []


def test_a_library_below_the_supported_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "_version", lambda name: "0.1")
    row = find(_checks.all_rows(), "peft")
    assert row.status == "warn"
    assert "pip install -U peft" in row.note


@pytest.mark.parametrize("library", ["bitsandbytes", "peft", "transformers", "deepspeed", "torchao", "liger_kernel"])
def test_the_supported_versions_are_those_of_the_package_metadata(library: str) -> None:
    floor = _checks._floor(library)
    assert floor is not None
    assert any(f">={floor}" in line for line in importlib.metadata.requires("lightning-memsave") or [])


def test_bitsandbytes_is_tried_and_not_only_imported(monkeypatch: pytest.MonkeyPatch, rows: list[_checks.Row]) -> None:
    assert "works on" in find(rows, "bitsandbytes").note
    import bitsandbytes.functional

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiled library")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    row = find(_checks.all_rows(), "bitsandbytes")
    assert (row.status, "no compiled library" in row.note) == ("warn", True)


def test_a_container_limit_is_the_machine_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  4000000 kB\n")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(_checks, "Path", lambda name: tmp_path / Path(name).name)
    assert _checks._memory() == (3_000_000, 2_000_000)


def test_no_lightning_is_the_answer_no(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_checks, "is_available", lambda name: name not in ("lightning", "pytorch_lightning"))
    assert main(["doctor", "--json"]) == 1
    capsys.readouterr()


def test_one_namespace_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_checks, "is_available", lambda name: name != "lightning")
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["machine"]
    assert next(row for row in rows if row["name"] == "lightning")["status"] == "info"


@pytest.mark.parametrize(
    ("allocator", "status", "note"),
    [("glibc", "info", "LD_PRELOAD"), ("tcmalloc", "ok", "same allocator"), (None, "info", "does not say")],
)
def test_the_process_allocator_is_named_with_what_to_do(
    allocator: str | None, status: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_memsave.memory.host.host_allocator", lambda: allocator)
    row = find(_checks.all_rows(), "process allocator")
    assert row.status == status
    assert note in row.note


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there is a GPU of a compute capability."""

    def pretend(major: int, minor: int, free: int) -> None:
        properties = SimpleNamespace(name="Some GPU", major=major, minor=minor)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")

    return pretend


def test_a_gpu_shows_its_memory_and_whether_it_is_free(gpu: Any) -> None:
    gpu(9, 0, 79 * 2**30)
    row = find(_checks._accelerators(), "cuda:0")
    assert (row.value, row.status, row.note) == ("Some GPU, 80.00 GiB, compute 9.0", "ok", "79.00 GiB free")
    gpu(9, 0, 20 * 2**30)
    row = find(_checks._accelerators(), "cuda:0")
    assert (row.status, row.note) == ("warn", "20.00 GiB free: another process uses it")


@pytest.mark.parametrize(
    ("capability", "formats"),
    [
        ((7, 0), {"bf16": "no", "int8": "no", "fp8": "no"}),
        ((7, 5), {"bf16": "no", "int8": "yes", "fp8": "no"}),
        ((8, 6), {"bf16": "yes", "int8": "yes", "fp8": "no"}),
        ((8, 9), {"bf16": "yes", "int8": "yes", "fp8": "yes"}),
        ((12, 0), {"bf16": "yes", "int8": "yes", "fp8": "yes"}),
    ],
)
def test_number_formats_follow_the_compute_capability(
    gpu: Any, capability: tuple[int, int], formats: dict[str, str]
) -> None:
    gpu(*capability, free=0)
    rows = _checks._number_formats()
    assert {row.name: row.value for row in rows} == formats
    assert all("here" in row.note for row in rows if row.value == "no"), "a no without what to write instead"


def test_the_cuda_allocator_says_whether_expandable_segments_are_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0, 0)
    assert "AllocatorSettings() turns" in find(_checks._accelerators(), "allocator").note
    with monkeypatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        assert find(_checks._accelerators(), "allocator").note == "expandable segments are on"
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert find(_checks._accelerators(), "allocator").status == "info"
