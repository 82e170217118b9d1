"""The YAML files under examples/configs run through a real LightningCLI."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from lightning_memsave import last_report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
COMPLETE = ("plain", "trio", "full", "qlora")
OVERLAYS = ("with_audit",)
TINY = ["--model.model=tiny", "--data.num_tokens=32", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    yield importlib.import_module("finetune").main
    for name in ("finetune", "smollm2"):
        sys.modules.pop(name, None)


def configs(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in names]


def kinds(trainer) -> list[str]:
    return [type(c).__name__ for c in trainer.callbacks if type(c).__module__.startswith("lightning_memsave.")]


def test_every_file_is_tested():
    assert sorted(p.stem for p in CONFIGS.iterdir()) == sorted([*COMPLETE, *OVERLAYS])


@pytest.mark.parametrize("name", COMPLETE)
def test_a_config_parses_without_running(cli, name):
    parsed = cli(configs(name), run=False)
    assert "MemoryProfiler" in kinds(parsed.trainer)
    assert not hasattr(parsed.model, "net")  # the weights are not read before the fit


@pytest.mark.parametrize("name", COMPLETE)
def test_an_overlay_adds_to_the_callbacks_of_the_first_file(cli, name):
    alone = kinds(cli(configs(name), run=False).trainer)
    both = kinds(cli(configs(name, "with_audit"), run=False).trainer)
    assert both == [*alone, "MemoryAudit"]


@pytest.mark.parametrize("name", COMPLETE)
def test_a_config_trains(cli, name, tmp_path):
    run = cli(["fit", *configs(name), *TINY, f"--trainer.default_root_dir={tmp_path}"])
    assert run.trainer.global_step == 2
    report = last_report()
    assert report is not None
    assert report.peak_bytes == sum(report.by_category.values()) > 0
    assert (tmp_path / "memsave" / "memory.html").exists()
    trains = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert trains
    assert all(("lora_" in n) == (name == "qlora") for n in trains)


def test_the_checkpoint_of_qlora_holds_no_base_weight(cli, tmp_path):
    cli(["fit", *configs("qlora"), *TINY, f"--trainer.default_root_dir={tmp_path}"])
    (path,) = tmp_path.rglob("*.ckpt")
    names = torch.load(path, weights_only=True)["state_dict"]
    assert names
    assert all("lora_" in name for name in names)


def test_a_typo_is_answered_with_the_names_that_exist(cli, capsys):
    with pytest.raises(SystemExit):
        cli([*configs("trio"), "--trainer.callbacks.rank=3"], run=False)
    assert "rank" in capsys.readouterr().err


def test_help_of_a_saver_explains_its_arguments(cli, capsys):
    with pytest.raises(SystemExit):
        cli(["fit", "--trainer.callbacks.help=lightning_memsave.QLoRA"])
    assert "rank" in capsys.readouterr().out
