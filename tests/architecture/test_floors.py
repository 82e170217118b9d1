"""Imports only point down, and files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_memsave"
FLOORS = {
    "errors": 0, "units": 0, "_imports": 0,
    "_match": 1, "memory": 1,
    "transforms": 2, "optim": 2, "parallel": 2, "data": 2,
    "planner": 3,
    "callbacks": 4, "strategies": 4, "precision": 4,
    "cli": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Return every absolute module imported, type-checking imports left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full module path"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    floor = FLOORS[room(path)]
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("lightning_memsave."):
            target = name.split(".")[1]
            if target in FLOORS:
                assert FLOORS[target] <= floor, f"floor {floor} imports {name} from floor {FLOORS[target]}"
        elif floor <= 3:
            assert name.split(".")[0] not in LIGHTNING, f"floor {floor} imports {name}: Lightning belongs on floor 4"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.isascii(), "comments and messages are ASCII"
    assert text.count("\n") <= 400, "no file over 400 lines: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            length = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert length <= 50, f"{node.name} has {length} lines: split it"
            if node.name == "__init__" and room(path) in {"callbacks", "strategies", "precision"}:
                count = len(node.args.args) + len(node.args.kwonlyargs) - 1
                assert count <= 8, f"__init__ takes {count} arguments: group the rest in a dataclass"


def test_every_package_on_disk_has_a_floor() -> None:
    assert {room(path) for path in FILES} <= set(FLOORS)
