"""The compatibility table: every cell is what happens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import nn

import lightning_memsave
from lightning_memsave import IncompatibleMethodsError
from lightning_memsave.callbacks import _session
from lightning_memsave.planner.catalog import CATALOG, method
from lightning_memsave.planner.compatibility import (
    METHOD_CONDITIONS,
    METHOD_PAIRS,
    METHOD_STRATEGIES,
    STRATEGIES,
    cell,
    check_methods,
    pair_problem,
    partners_refused,
)

# FP8Precision needs a GPU: tests/gpu/test_precision_gpu.py
NAMES = [row.name for row in CATALOG if row.slot == "callbacks" or row.name == "BF16Precision"]
REFUSED = sorted(tuple(sorted(pair)) for pair in METHOD_PAIRS)
ALLOWED = [pair for pair in itertools.combinations(NAMES, 2) if frozenset(pair) not in METHOD_PAIRS]


def make(*names: str) -> dict[str, list[Any]]:
    """Return Trainer arguments with the methods in their slots."""
    arguments: dict[str, list[Any]] = {}
    for name in names:
        made = getattr(lightning_memsave, name)(**method(name).init_args)
        arguments.setdefault(method(name).slot, []).append(made)
    return arguments


def partly_frozen() -> LitLM:
    """A module with something for every method: frozen parts to leave out or to quantize, and trained parts."""
    module = LitLM(lr=1e-2)
    module.net.embedding.requires_grad_(False)
    module.net.blocks[0].requires_grad_(False)
    return module


def shape(module: nn.Module) -> list[tuple[str, str, bool]]:
    """What a method could have changed before it was refused."""
    classes = [(name, type(m).__qualname__, "forward" in m.__dict__) for name, m in module.named_modules()]
    return classes + [(name, str(p.dtype), p.requires_grad) for name, p in module.named_parameters()]


def test_the_table_speaks_of_methods_and_strategies_that_exist() -> None:
    assert {name for pair in METHOD_PAIRS for name in pair} <= set(NAMES)
    assert {name for name, _ in METHOD_STRATEGIES} <= {*NAMES, "FP8Precision"}
    assert {kind for _, kind in METHOD_STRATEGIES} <= set(STRATEGIES)
    assert all(len(pair) == 2 for pair in METHOD_PAIRS)
    assert not set(METHOD_CONDITIONS) & set(METHOD_STRATEGIES)
    assert {cell(name, kind)[0] for name in NAMES for kind in STRATEGIES} == {"yes", "partly", "no", "untested"}


def test_a_run_on_a_strategy_that_was_never_tried_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, str]] = []
    monkeypatch.setattr(_session, "strategy_kind", lambda strategy: "deepspeed")
    monkeypatch.setattr(_session.Session, "report", lambda self, name, line, **kwargs: lines.append((name, line)))
    make_trainer(**make("ActivationCheckpointing")).fit(LitLM(), make_loader())
    assert lines[0] == ("ActivationCheckpointing", "not tested on SingleDeviceStrategy; compare losses")


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_a_refused_pair_is_refused_before_the_model_is_touched(pair: tuple[str, str]) -> None:
    module = LitLM()
    before = shape(module)
    with pytest.raises(IncompatibleMethodsError) as error:
        make_trainer(**make(*pair)).fit(module, make_loader())
    assert f"{pair[0]} and {pair[1]} do not combine: {METHOD_PAIRS[frozenset(pair)]}" in str(error.value)
    assert shape(module) == before


@pytest.mark.parametrize("pair", ALLOWED, ids=" + ".join)
def test_a_pair_that_is_not_listed_trains(pair: tuple[str, str]) -> None:
    module = partly_frozen()
    make_trainer(max_epochs=2, **make(*pair)).fit(module, make_loader())
    assert len(module.losses) == 6
    assert sum(module.losses[3:]) < sum(module.losses[:3]), "the second epoch learned nothing"


@pytest.mark.filterwarnings("ignore:.*on FSDP1 checkpoints hold the frozen base too")
def test_a_refused_strategy_is_refused_before_the_model_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for (name, kind), reason in {("LoRA", "a test's"): "write another", **METHOD_STRATEGIES}.items():
        monkeypatch.setitem(METHOD_STRATEGIES, (name, kind), reason)
        monkeypatch.setattr(_session, "strategy_kind", lambda strategy, kind=kind: kind)
        module = LitLM()
        before = shape(module)
        with pytest.raises(IncompatibleMethodsError) as error:
            make_trainer(**make(name)).fit(module, make_loader())
        assert f"{name} does not run on the {kind!r} strategy: {reason}" in str(error.value)
        assert shape(module) == before


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(IncompatibleMethodsError) as error:
        check_methods(["QLoRA", "LoRA", "WeightQuantization"], "single")
    assert str(error.value).count("do not combine") == 2


def test_a_strategy_nobody_knows_is_not_refused() -> None:
    check_methods(NAMES[:1], "other")


def test_the_table_reads_the_same_from_either_side() -> None:
    for first, second in itertools.permutations(NAMES, 2):
        assert pair_problem(first, second) == pair_problem(second, first)
        assert partners_refused(first).get(second) == pair_problem(first, second)


def test_methods_are_told_apart_by_module_state_not_by_luck() -> None:
    # `shape` must see a change, or the tests above prove nothing
    module = LitLM()
    before = shape(module)
    module.net.head.weight.requires_grad_(False)
    assert shape(module) != before
    module = LitLM()
    module.net.head.to(torch.bfloat16)
    assert shape(module) != before
