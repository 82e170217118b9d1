"""The GPU suite without a GPU: a real tiny row, going on where it stopped, never overwriting, the page, the budget."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.bench import bench_suite, worker
from gpu.bench.page import BEGIN, END, render, update_page
from gpu.bench.results import IDENTITY, Results
from gpu.bench.rows import ROWS, SHAPES, Row, row

import lightning_memsave

ABOUT = {
    "hardware": "A GPU",
    "package_version": "0.1.0",
    "torch_version": "2.9",
    "python_version": "3.12.1",
    "versions": {"torch": "2.9", "peft": "0.1"},
    "device_bytes": 80 * 2**30,
    "cuda_version": "13.0",
    "driver_version": "580.1",
}
RESULT = {
    "status": "ok",
    "peak_allocated_bytes": 3 * 2**30,
    "peak_reserved_bytes": 4 * 2**30,
    "setup_peak_allocated_bytes": 2**30,
    "host_peak_bytes": 5 * 2**30,
    "step_seconds": 0.5,
    "tokens_per_second": 16384.0,
    "losses": [11.7625, 9.0],
}
BIG = tuple(r for r in ROWS if not r.shape.startswith("tiny"))


class Clock:
    """A clock that measuring moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def suite(tmp_path: Path, clock: Clock) -> bench_suite.Suite:
    return bench_suite.Suite(
        results=Results(tmp_path / "docs" / "gpu.jsonl"),
        about=ABOUT,
        device="cuda",
        command="python bench_suite.py",
        commit="abc123",
        clock=clock,
    )


def _measure(clock: Clock, **changes: Any) -> Callable[[Row, float], dict[str, Any]]:
    def measure(row: Row, limit_seconds: float) -> dict[str, Any]:
        assert limit_seconds >= row.estimate_seconds
        clock.now += row.estimate_seconds
        return {**RESULT, **changes}

    return measure


# -- the rows -------------------------------------------------------------------------------------------------------
def test_names_are_unique_and_every_row_of_ours_has_its_counterpart() -> None:
    names = [r.name for r in ROWS]
    assert len(set(names)) == len(names)
    for ours in (r for r in ROWS if r.framework == "memsave" and not r.variant):
        theirs = row(ours.name.replace("memsave", "huggingface"))
        assert (theirs.shape, theirs.method, theirs.batch, theirs.tokens) == (
            ours.shape,
            ours.method,
            ours.batch,
            ours.tokens,
        )
        assert theirs.learning_rate == ours.learning_rate


def test_every_row_fits_into_one_slice_and_its_savers_exist() -> None:
    for chosen in ROWS:
        assert chosen.shape in SHAPES
        assert chosen.estimate_seconds < bench_suite.BUDGET_SECONDS - bench_suite.RESERVE_SECONDS
        for name, arguments in chosen.savers:
            assert getattr(lightning_memsave, name)(**arguments)
    with pytest.raises(KeyError, match="no row 'nothing'"):
        row("nothing")


def test_shapes_have_the_sizes_of_the_models_they_are_named_after() -> None:
    def parameters(name: str) -> int:
        s = SHAPES[name]
        attention = s.hidden * s.hidden * 2 + 2 * s.hidden * (s.hidden // s.heads * s.kv_heads)
        layer = attention + 3 * s.hidden * s.intermediate + 2 * s.hidden
        return s.layers * layer + s.hidden + s.vocabulary * s.hidden * (1 if s.tied else 2)

    vit = SHAPES["vit-g-1.1b"]
    assert 40 * (4 * vit.hidden**2 + 2 * vit.hidden * vit.intermediate) == 1_009_254_400
    assert vit.tokens == next(r.tokens for r in ROWS if r.shape == "vit-g-1.1b")
    assert parameters("llama-3.2-3b") == 3_212_749_824
    assert parameters("llama-3.1-8b") == 8_030_261_248


# -- slices ---------------------------------------------------------------------------------------------------------
def test_a_slice_ends_within_its_budget_and_the_next_goes_on(suite: bench_suite.Suite, clock: Clock) -> None:
    slices = 0
    while rows := suite.todo(None):
        begin, before = clock.now, len(suite.results.records())
        failures, left = suite.run(rows, bench_suite.BUDGET_SECONDS, _measure(clock))
        assert failures == 0
        assert clock.now - begin <= bench_suite.BUDGET_SECONDS
        assert len(suite.results.records()) - before == len(rows) - len(left) > 0
        slices += 1
    assert 1 < slices < len(BIG)
    assert {r["row"] for r in suite.results.records()} == {r.name for r in BIG}


def test_a_short_row_is_taken_where_a_long_one_no_longer_fits(suite: bench_suite.Suite, clock: Clock) -> None:
    rows = sorted(BIG, key=lambda r: -r.estimate_seconds)
    budget = rows[-1].estimate_seconds + bench_suite.RESERVE_SECONDS
    _, left = suite.run(rows, budget, _measure(clock))
    assert len(suite.results.records()) == 1
    assert len(left) == len(rows) - 1


def test_measured_rows_are_left_out_until_hardware_version_or_revision_changes(
    suite: bench_suite.Suite, clock: Clock
) -> None:
    suite.run(suite.todo(None), 10_000, _measure(clock))
    assert suite.todo(None) == []
    for changes in ({"hardware": "another GPU"}, {"package_version": "0.2.0"}, {"torch_version": "3.0"}):
        other = bench_suite.Suite(
            results=suite.results, about={**ABOUT, **changes}, device="cuda", command="c", commit="c"
        )
        assert other.todo(None) == list(BIG)


def test_running_out_of_memory_is_a_result_that_is_kept(suite: bench_suite.Suite, clock: Clock) -> None:
    suite.run([BIG[0]], 500, _measure(clock, status="oom", error="CUDA out of memory"))
    assert suite.results.records()[0]["status"] == "oom"
    assert BIG[0] not in suite.todo(None)
    assert "**out of memory**" in render(suite.results.records())


def test_a_failed_process_is_no_result_and_stays_to_be_measured(suite: bench_suite.Suite, clock: Clock) -> None:
    failures, left = suite.run(BIG[:2], 500, _measure(clock, status="failed"))
    assert failures == 2
    assert left == list(BIG[:2])
    assert suite.results.records() == []


def test_a_row_that_is_too_slow_for_a_whole_slice_is_recorded_so(suite: bench_suite.Suite, clock: Clock) -> None:
    slow = _measure(clock, status="timeout", limit_seconds=530)
    _, left = suite.run(BIG[:2], bench_suite.BUDGET_SECONDS, slow)
    assert [r["status"] for r in suite.results.records()] == ["timeout"]  # it had the whole slice
    assert left == [BIG[1]]  # it had what was left of one, so it is tried again
    assert "**over 530 s**" in render(suite.results.records())


# -- results and page -----------------------------------------------------------------------------------------------
def _record(**changes: Any) -> dict[str, Any]:
    return {
        **ABOUT,
        **RESULT,
        "row": "a",
        "revision": 1,
        "commit": "c1",
        "date": "2026-01-02",
        "command": "x",
    } | changes


def test_a_row_is_never_overwritten(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.append(_record())
    before = results.path.read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        results.append(_record(step_seconds=0.1, commit="c2"))
    with pytest.raises(ValueError, match="a result needs hardware"):
        results.append({k: v for k, v in _record().items() if k != "hardware"})
    assert results.path.read_bytes() == before
    for changed in IDENTITY:
        results.append(_record(**{changed: 7}))
    assert results.path.read_bytes().startswith(before)
    assert len(results.records()) == 1 + len(IDENTITY)


def test_results_of_another_machine_are_merged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results(tmp_path / "brought.jsonl").append(_record())
    arguments = ["--merge", str(tmp_path / "brought.jsonl"), "--results", str(tmp_path / "r.jsonl")]
    assert bench_suite.main(arguments) == 0
    assert bench_suite.main(arguments) == 0
    assert [line.split(" new")[0] for line in capsys.readouterr().out.splitlines()] == ["[bench] 1", "[bench] 0"]
    assert len(Results(tmp_path / "r.jsonl").records()) == 1
    assert "A GPU" in (tmp_path / "r.md").read_text()


def test_the_page_shows_where_how_and_what_was_measured() -> None:
    text = render([_record(savers="QLoRA(rank=16)")])
    for part in (
        "## A GPU, lightning_memsave 0.1.0, torch 2.9",
        "Commit `c1`, CUDA 13.0, driver 580.1, 80.0 GiB of memory, Python 3.12.1, peft 0.1, torch 2.9; 2026-01-02. "
        "Command: `x`",
        "| a | `QLoRA(rank=16)` | 3.00 GiB | 4.00 GiB | 1.00 GiB | 5.00 GiB | 0.500 s | 16,384 | 11.762 to 9.000 |",
    ):
        assert part in text
    assert render([]).strip() == "No row has been measured yet."


def test_another_commit_is_another_section_and_rows_keep_the_suites_order() -> None:
    names = [BIG[2].name, BIG[0].name, "gone since"]
    text = render([_record(row=name) for name in names] + [_record(row="a", commit="c2")])
    assert text.count("\n| --- |") + text.count("\n|" + " --- |") >= 2
    assert text.index(BIG[0].name) < text.index(BIG[2].name) < text.index("gone since") < text.index("Commit `c2`")


def test_what_people_wrote_on_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"# Title\n\nProse.\n\n{BEGIN}\nold\n{END}\n\nMore prose.\n")
    for _ in range(2):
        update_page(page, [_record()])
        text = page.read_text()
        assert text.startswith(f"# Title\n\nProse.\n\n{BEGIN}\n")
        assert text.endswith(f"{END}\n\nMore prose.\n")
        assert "old" not in text
        assert text.count("3.00 GiB") == 1
    page.write_text("# No marks\n")
    with pytest.raises(ValueError, match="must contain the line"):
        update_page(page, [])


def test_the_first_result_creates_the_page_with_how_to_run_it(tmp_path: Path) -> None:
    update_page(tmp_path / "gpu.md", [_record()])
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# GPU results")
    assert "make bench-gpu" in text
    assert "3.00 GiB" in text


def test_the_committed_page_holds_the_committed_results() -> None:
    folder = bench_suite.ROOT / "docs" / "benchmarks"
    records = Results(folder / "gpu.jsonl").records()
    assert (folder / "gpu.md").exists() == bool(records)
    if records:
        assert render(records).strip() in (folder / "gpu.md").read_text()


# -- the processes --------------------------------------------------------------------------------------------------
def test_a_process_that_runs_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    assert bench_suite.run_process([sys.executable, "-c", code], 1.0) is None
    assert bench_suite.run_process([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == 3


def test_statuses_of_a_process_become_statuses_of_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure = bench_suite.measure_in_process("cpu", tmp_path)
    for exit_status, expected in ((None, "timeout"), (-9, "oom"), (1, "failed"), (0, "failed")):
        monkeypatch.setattr(bench_suite, "run_process", lambda command, limit, status=exit_status: status)
        assert measure(ROWS[0], 10.0)["status"] == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("out of memory"),
    ],
)
def test_running_out_of_memory_is_recognised_whoever_raises_it(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(*args: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "gpu.bench.run_memsave", types.SimpleNamespace(train=train))
    found = worker.measure(ROWS[0], "cpu", tmp_path)
    assert found["status"] == "oom"
    assert "out of memory" in found["error"].lower()


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train(*args: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(sys.modules, "gpu.bench.run_memsave", types.SimpleNamespace(train=train))
    with pytest.raises(RuntimeError, match="shapes differ"):
        worker.measure(ROWS[0], "cpu", tmp_path)


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_suite.main(["--results", str(tmp_path / "r.jsonl")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert bench_suite.main(["--device", "cpu", "--only", "gpt-5/*"]) == 2
    assert "matches no row" in capsys.readouterr().out
    assert not (tmp_path / "r.jsonl").exists()


def _measure_tiny(folder: Path, *more: str) -> list[dict[str, Any]]:
    arguments = ["--device", "cpu", "--results", str(folder / "r.jsonl"), "--scratch", str(folder), "--commit", "c"]
    assert bench_suite.main([*arguments, *more]) == 0
    return Results(folder / "r.jsonl").records()


def test_a_tiny_row_is_measured_on_the_cpu_and_not_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--only", "tiny/full/2x32/memsave")
    (record,) = _measure_tiny(tmp_path, *chosen)
    assert record["status"] == "ok"
    assert len(record["losses"]) == record["steps"] == 8
    assert record["step_seconds"] > 0
    assert record["host_peak_bytes"] > 2**26
    assert record["commit"] == "c"
    assert record["command"].startswith("python tests/gpu/bench/bench_suite.py --device cpu")
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert "tiny/full/2x32/memsave" in (tmp_path / "r.md").read_text()
    written = (tmp_path / "r.jsonl").read_bytes()
    assert _measure_tiny(tmp_path, *chosen) == [record]
    assert (tmp_path / "r.jsonl").read_bytes() == written
    assert "0 rows measured, 0 left" in capsys.readouterr().out


@pytest.mark.slow
def test_both_frameworks_train_the_same_model_on_the_same_tokens(tmp_path: Path) -> None:
    records = _measure_tiny(tmp_path)
    assert [r["row"] for r in records] == [r.name for r in ROWS if r.shape.startswith("tiny")]
    first = {r["row"].split("/", 1)[1]: r["losses"][0] for r in records}
    # the first losses agree to what bf16 and 4-bit arithmetic leave (worst seen: 0.003)
    assert first["full/2x32/memsave"] == pytest.approx(first["full/2x32/huggingface"], abs=0.02)
    assert first["qlora/2x32/memsave"] == pytest.approx(first["qlora/2x32/huggingface"], abs=0.02)
