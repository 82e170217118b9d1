"""Errors, sizes, optional imports and module selection."""

from __future__ import annotations

import pytest
from helpers import TinyLM

from lightning_memsave._imports import EXTRAS, is_available, require
from lightning_memsave._match import as_patterns, match_modules
from lightning_memsave.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    IncompatibleMethodsError,
    MemsaveError,
    MissingDependencyError,
    NothingToTransformError,
    raise_problems,
)
from lightning_memsave.units import GIB, format_bytes, parse_size


def test_the_error_tree_is_the_documented_one() -> None:
    assert issubclass(ConfigurationError, (MemsaveError, ValueError))
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(IncompatibleMethodsError, ConfigurationError)
    assert issubclass(MissingDependencyError, ImportError)
    for error in (NothingToTransformError, CheckpointMismatchError, MissingDependencyError, ConfigurationError):
        assert issubclass(error, MemsaveError)


def test_all_problems_are_listed_at_once() -> None:
    raise_problems("X", [])
    with pytest.raises(ConfigurationError, match=r"^X: one$"):
        raise_problems("X", ["one"])
    with pytest.raises(ConfigurationError) as caught:
        raise_problems("X", ["one", "two"])
    assert str(caught.value) == "X:\n  - one\n  - two"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GiB", 24 * GIB), ("500MB", 500_000_000), (" 1.5 KiB ", 1536), (7, 7), ("0B", 0), ("2 tb", 2 * 10**12)],
)
def test_sizes_are_read(text: int | str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["24", "GiB", "24 G", "-1GiB", -1, None, True, 1.5, "1e3MB"])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ConfigurationError, match="size"):
        parse_size(text)


def test_shown_bytes_are_binary_and_say_so() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * GIB // 2)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]


def test_a_missing_library_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "no_such_library", "bnb")
    with pytest.raises(
        MissingDependencyError, match=r'Thing needs no_such_library, .*pip install "lightning-memsave\[bnb\]"'
    ):
        require("no_such_library", "Thing")
    assert not is_available("no_such_library")
    assert require("json", "Thing").dumps(1) == "1"


def test_a_library_that_fails_to_import_says_why(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libfoo.so is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"importing it failed: libfoo.so is missing"):
        require("broken_library", "Thing")


@pytest.mark.parametrize("modules", ["", [], [""], [1], 5, None])
def test_an_empty_selection_is_refused(modules: object) -> None:
    with pytest.raises(ConfigurationError, match="selects nothing"):
        as_patterns(modules, subject="X")


def test_patterns_are_globs_over_names_or_class_names() -> None:
    model = TinyLM()
    names = [name for name, _ in match_modules(model, ["blocks.*.norm?", "Embedding"], subject="X")]
    assert names == ["embedding", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"]


def test_no_match_names_the_nearest_modules() -> None:
    with pytest.raises(NothingToTransformError, match=r"modules='Blok' matched none of the \d+ submodules.*'Block'"):
        match_modules(TinyLM(), ["Blok"], subject="X")
    with pytest.raises(NothingToTransformError, match="'nothing'"):
        match_modules(TinyLM(), ["Block", "nothing"], subject="X")
