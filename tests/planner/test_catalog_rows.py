"""The catalog: one complete row per method."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_memsave._imports import EXTRAS
from lightning_memsave.planner.catalog import CATALOG, Method, method


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: row.name)
def test_a_row_says_what_a_user_must_know(row: Method) -> None:
    assert row.saves
    assert row.costs
    assert row.use_when
    assert set(row.requires) <= set(EXTRAS), "a library without an extra has no pip line"
    if row.numerics == "statistical":
        assert "https://" in row.source, "another way of training needs its source"


def test_names_are_unique() -> None:
    assert len({row.name for row in CATALOG}) == len(CATALOG)


def test_rows_are_data_that_nobody_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method("LoRA").name = "Other"  # type: ignore[misc]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="'Nothing' is not in the catalog; it has ActivationCheckpointing"):
        method("Nothing")
