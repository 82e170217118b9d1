"""``memsave run``: the script does not notice, and its Trainers get the savers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import json, os, sys
import __main__
def f(x: int): pass
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "variable": os.environ.get("LIGHTNING_MEMSAVE"), "torch": "torch" in sys.modules,
    "main": __main__.__dict__ is globals(), "annotations": str(f.__annotations__),
    "spec": getattr(__main__.__spec__, "name", None),
}))
"""

TRAINER = """
import sys
import lightning.pytorch as pl
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
print("COMMAND", _basic_subprocess_cmd())
trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
print("CALLBACKS", [type(c).__name__ for c in trainer.callbacks])
"""

DDP = """
import os, sys
sys.path.insert(0, os.environ["HELPERS"])
import lightning.pytorch as pl
from helpers import LitLM, make_loader, make_trainer

class Tell(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        names = [type(c).__name__ for c in trainer.callbacks]
        open(f"rank-{trainer.global_rank}.txt", "w").write(" ".join([*names, *sys.argv]))

if __name__ == "__main__":
    make_trainer(devices=2, strategy="ddp", callbacks=[Tell()]).fit(LitLM(), make_loader())
"""


def memsave(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lightning_memsave", "run", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def shown(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    file = tmp_path / "project" / "show.py"
    file.write_text(SHOW)
    return file


def test_the_script_runs_as_python_would_run_it(script: Path) -> None:
    seen = shown(memsave("--methods", "basic", "project/show.py", "--help", "--methods", "x", "--", "-m"))
    plain = json.loads(
        subprocess.run(
            [sys.executable, "project/show.py", "--help", "--methods", "x", "--", "-m"],
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert seen.pop("variable") == "basic"
    plain.pop("variable")
    assert seen == plain


def test_a_module_runs_as_python_dash_m_would_run_it(script: Path) -> None:
    seen = shown(memsave("--methods", "basic", "-m", "project.show", "a", "-m"))
    plain = json.loads(
        subprocess.run(
            [sys.executable, "-m", "project.show", "a", "-m"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert seen.pop("variable") == "basic"
    plain.pop("variable")
    assert seen == plain


def test_torch_is_not_imported_before_the_script_sets_its_environment(script: Path) -> None:
    assert shown(memsave("--methods", "basic", str(script)))["torch"] is False


def test_the_variable_of_the_caller_is_used_without_the_option(script: Path) -> None:
    assert shown(memsave(str(script), LIGHTNING_MEMSAVE="qlora"))["variable"] == "qlora"


def test_a_yaml_path_is_made_absolute_since_scripts_change_directory(script: Path, tmp_path: Path) -> None:
    (tmp_path / "methods.yaml").write_text("- {class_path: lightning_memsave.EarlyZeroGrad}\n")
    assert shown(memsave("--methods", "methods.yaml", str(script)))["variable"] == str(tmp_path / "methods.yaml")


def test_without_methods_it_says_that_nothing_is_attached(script: Path) -> None:
    result = memsave(str(script))
    assert shown(result)["variable"] is None
    assert "nothing is attached" in result.stderr


def test_the_script_is_still_the_main_module_when_exit_handlers_run(tmp_path: Path) -> None:
    (tmp_path / "end.py").write_text(
        "import atexit, sys\nvalue = 5\natexit.register(lambda: print(sys.modules['__main__'].value))"
    )
    result = memsave("--methods", "basic", "end.py")
    assert (result.returncode, result.stdout) == (0, "5\n"), result.stderr


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise ValueError('of the script')", 1, "ValueError: of the script"),
        ("from lightning_memsave import ConfigurationError as E; raise E('in the script')", 1, "Traceback"),
        ("", 0, ""),
    ],
)
def test_the_exit_code_is_the_scripts(tmp_path: Path, body: str, code: int, text: str) -> None:
    (tmp_path / "end.py").write_text(body)
    result = memsave("--methods", "basic", "end.py")
    assert result.returncode == code
    assert text in result.stderr


def test_unknown_methods_are_bad_input_before_the_script_starts(script: Path) -> None:
    result = memsave("--methods", "qlroa", str(script))
    assert result.returncode == 2
    assert "Did you mean 'qlora'?" in result.stderr
    assert result.stdout == ""


def test_json_shows_the_plan_and_runs_nothing(script: Path) -> None:
    result = memsave("--methods", "basic", "--json", str(script), "--epochs", "3")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["environment"] == {"LIGHTNING_MEMSAVE": "basic"}
    assert "ActivationCheckpointing()" in plan["callbacks"]
    assert plan["command"] == ["python", str(script), "--epochs", "3"]


def test_trainers_get_the_callbacks_and_ddp_would_relaunch_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINER)
    result = memsave("--methods", "basic", "train.py", "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert f"COMMAND {[sys.executable, str(tmp_path / 'train.py'), '--epochs', '3']}" in result.stdout
    assert "'EarlyZeroGrad', 'AllocatorSettings', 'ActivationCheckpointing'" in result.stdout
    assert result.stderr.count("[memsave] LIGHTNING_MEMSAVE=basic: attaching") == 1


@pytest.mark.parametrize(
    "launcher",
    ["script", pytest.param("module", marks=pytest.mark.slow), pytest.param("torchrun", marks=pytest.mark.slow)],
)
def test_every_ddp_rank_gets_the_callbacks(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "train.py").write_text(DDP)
    words = {
        "script": ["-m", "lightning_memsave", "run", "--methods", "basic", "train.py", "--flag"],
        "module": ["-m", "lightning_memsave", "run", "--methods", "basic", "-m", "train", "--flag"],
        "torchrun": [
            "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731",
            "-m", "lightning_memsave", "run", "--methods", "basic", "train.py", "--flag",
        ],
    }[launcher]  # fmt: skip
    environment = {**os.environ, "HELPERS": str(Path(__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        told = (tmp_path / f"rank-{rank}.txt").read_text().split()
        assert {"EarlyZeroGrad", "ActivationCheckpointing", "--flag"} <= set(told)
    assert result.stderr.count("[memsave] LIGHTNING_MEMSAVE=basic") == 1, "said once, on rank zero"
