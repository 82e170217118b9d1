"""One row per method: the catalog, the package and Lightning agree."""

from __future__ import annotations

import importlib
import inspect

import pytest

import lightning_memsave
from lightning_memsave.callbacks._lightning import NAMESPACES
from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.planner.catalog import CATALOG, Method

# A base class, not a method.
BASES = {"ModelTransform"}


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)
def test_every_row_instantiates_its_class_path_with_its_arguments(row: Method) -> None:
    module, _, name = row.class_path.rpartition(".")
    made = getattr(importlib.import_module(module), name)(**row.init_args)
    if row.slot == "callbacks":
        assert isinstance(made, Saver)
    for namespace in NAMESPACES:
        base = {
            "callbacks": namespace.Callback,
            "strategy": importlib.import_module(f"{namespace.__name__}.strategies").Strategy,
            "plugins": importlib.import_module(f"{namespace.__name__}.plugins").Precision,
        }[row.slot]
        assert isinstance(made, base)


def test_every_public_callback_has_a_row() -> None:
    public = {name: getattr(lightning_memsave, name) for name in lightning_memsave.__all__}
    savers = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Saver)}
    assert savers - BASES == {row.name for row in CATALOG if row.slot == "callbacks"}


def test_no_name_collides_with_lightning() -> None:
    for namespace in NAMESPACES:
        callbacks = importlib.import_module(f"{namespace.__name__}.callbacks")
        assert not set(lightning_memsave.__all__) & set(callbacks.__all__)
