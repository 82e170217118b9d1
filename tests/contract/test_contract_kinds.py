"""Every method on every kind of module: equal results where it promises them, training or a clear refusal elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_memsave import LowMemoryOptimizer
from lightning_memsave.errors import MemsaveError
from lightning_memsave.planner.catalog import CATALOG

from .harness import NAMESPACES, assert_equal, fit, plain, run
from .kinds import KINDS
from .methods import EXACT, METHODS, NEEDS_FROZEN_PARTS, OTHERS, REFUSED, combinations, exact_set, make
from .tasks import Task

# AdamW in another implementation: the worst difference of a loss seen over these kinds is 2.8e-7 (graph).
ADAM_TOLERANCE = 2e-6
ADAM_KINDS = tuple(kind for kind, row in KINDS.items() if row.task.configure_optimizers is Task.configure_optimizers)


def test_every_method_of_the_catalog_has_a_row() -> None:
    assert {*METHODS, *NEEDS_FROZEN_PARTS} == {row.name for row in CATALOG if row.slot == "callbacks"}
    assert {kind for _, kind in REFUSED} <= set(KINDS)
    assert len(EXACT) + len(OTHERS) == len(METHODS)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_run_repeats_bit_by_bit(kind: str, namespace: str) -> None:
    # the ground everything else stands on; both namespaces train alike
    first = plain(kind, namespace)
    assert_equal(run(kind, namespace=namespace), first)
    assert first.losses == plain(kind).losses
    assert all(math.isfinite(loss) for loss in first.losses)


@pytest.mark.parametrize(("name", "kind"), combinations(EXACT, list(KINDS)))
def test_an_exact_method_changes_no_bit_and_leaves_nothing(name: str, kind: str) -> None:
    assert_equal(run(kind, [make(name, kind)]), plain(kind))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_exact_methods_together_change_no_bit(kind: str, namespace: str) -> None:
    assert_equal(run(kind, exact_set(kind), namespace=namespace), plain(kind, namespace))


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_method_that_cannot_work_on_a_kind_is_refused_by_name(name: str, kind: str) -> None:
    with pytest.raises(MemsaveError, match=REFUSED[name, kind]):
        run(kind, [make(name, kind)])


@pytest.mark.parametrize(("name", "kind"), combinations(OTHERS, list(KINDS)))
def test_another_method_trains(name: str, kind: str) -> None:
    module, trainer = fit(kind, [make(name, kind)])
    assert all(math.isfinite(loss) for loss in module.losses)
    assert len(module.losses) == len(plain(kind).losses)
    assert trainer.global_step == plain(kind).global_step
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert trained, f"{name} left nothing to train in {kind}"


@pytest.mark.parametrize("kind", ADAM_KINDS)
def test_a_swapped_optimizer_with_32bit_state_is_the_users_adamw(kind: str) -> None:
    # below `min_8bit_size` values the state stays 32-bit, so that only rounding may differ
    swap = LowMemoryOptimizer("adamw_8bit", options={"min_8bit_size": 2**20})
    found = torch.tensor(run(kind, [swap]).losses)
    torch.testing.assert_close(found, torch.tensor(plain(kind).losses), rtol=ADAM_TOLERANCE, atol=ADAM_TOLERANCE)
