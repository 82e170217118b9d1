"""What stands on the pages runs: every Python block, every YAML file, every memsave command."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from helpers import LitLM, make_loader
from lightning.pytorch.cli import LightningCLI

import lightning_memsave
from lightning_memsave.callbacks._callback_list import read_callbacks
from lightning_memsave.callbacks.presets import PRESETS
from lightning_memsave.cli.main import VERBS
from lightning_memsave.memory.ledger import CATEGORIES
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.transforms.checkpoint_blocks import POLICIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "benchmarks")]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "yaml", "bash", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text[: m.start()].count("\n") + 2, m[1], m[2]) for m in FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def commands(word: str) -> list[Any]:
    lines = [(block, line) for block in of("bash") for line in block.text.splitlines()]
    return [pytest.param(line, id=f"{block} {line}") for block, line in lines if line.startswith(word)]


class LitModel(LitLM):
    """The reader's own module: small, and it takes no arguments."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def my_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's own project, as the pages import it."""

    def train(**trainer_arguments: Any) -> None:
        pl.Trainer(**trainer_arguments).fit(LitModel(), make_loader())

    project = ModuleType("my_project")
    project.__dict__.update(LitModel=LitModel, train_loader=make_loader(), train=train)
    monkeypatch.setitem(sys.modules, "my_project", project)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, my_project: None) -> None:
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page, "python"):
        # Line numbers of a traceback are those of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_the_yaml_of_a_page_is_read_by_what_it_is_for(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memsave.yaml"
    file.write_text(block.text)
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and "callbacks" in content:  # Hydra
        for entry in content["callbacks"].values():
            module, _, name = entry.pop("_target_").rpartition(".")
            getattr(importlib.import_module(module), name)(**entry)
        return
    settings = {} if isinstance(content, list) else content["trainer"]
    written = next((settings[key] for key in ("callbacks", "callbacks+") if key in settings), content)
    expected = [entry["class_path"].rpartition(".")[2] for entry in written]
    if len(settings) <= 1:
        assert [type(c).__name__ for c in read_callbacks(file, subject="test")] == expected
    if isinstance(content, dict):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
        cli = LightningCLI(LitModel, run=False, seed_everything_default=0)
        assert {"ActivationCheckpointing"} < set(expected) <= {type(c).__name__ for c in cli.trainer.callbacks}
        for plugin in settings.get("plugins", []):
            assert type(cli.trainer.precision_plugin).__name__ == plugin["class_path"].rpartition(".")[2]


def parse(line: str) -> argparse.Namespace:
    words = shlex.split(line, comments=True)[1:]
    module = importlib.import_module(f"lightning_memsave.cli.{words[0]}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser.parse_args([word for word in words[1:] if word != "--help"])


@pytest.mark.parametrize("line", commands("memsave "))
def test_the_memsave_commands_of_a_page_are_right(line: str) -> None:
    assert line.split()[1] in VERBS
    if "--help" not in line:
        parse(line)


@pytest.mark.parametrize("line", commands("LIGHTNING_MEMSAVE="))
def test_the_values_of_the_variable_are_presets_or_files(line: str) -> None:
    value = line.split()[0].partition("=")[2]
    assert value in PRESETS or value.endswith(".yaml")


@pytest.mark.parametrize("line", commands("make "))
def test_the_make_targets_exist(line: str) -> None:
    assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_has_no_block_that_nothing_checks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page)), "a fence without a language, or one that is not closed"
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert text.isascii() or page.name == "README.md"


def test_every_public_name_is_explained() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in lightning_memsave.__all__ if not re.search(rf"\b{name}\b", text)]


def test_every_choice_has_a_row_on_its_page() -> None:
    how_to = ROOT / "docs" / "how-to"
    for page, choices in (("optimizers.md", OPTIMIZERS), ("activation-checkpointing.md", POLICIES)):
        text = (how_to / page).read_text(encoding="utf-8")
        assert not [choice for choice in choices if f"\n| `{choice}`" not in text], page
    text = (how_to / "profiler.md").read_text(encoding="utf-8")
    assert not [name for name in CATEGORIES if name != "other" and f"\n| `{name}`" not in text]


def test_the_reference_lists_every_public_name() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: lightning_memsave\.(\w+)$", text, re.MULTILINE))
    assert listed == set(lightning_memsave.__all__) - {"__version__"}


def test_the_generated_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)  # type: ignore[union-attr]
    used = set()
    for page in generate.PAGES:
        text = page.read_text(encoding="utf-8")
        used |= set(re.findall(r"<!-- generated: ([a-z-]+) -->", text))
        assert generate.filled(text) == text, f"run: python docs/generate.py ({page.name} is out of date)"
    assert used == set(generate.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stderr
    assert "lightning_memsave.QLoRA" in (tmp_path / "site" / "reference" / "callbacks.html").read_text()
