"""Presets: named lists of callbacks."""

from __future__ import annotations

import pytest
from helpers import LitLM, make_loader, make_trainer

import lightning_memsave
from lightning_memsave import ConfigurationError, preset
from lightning_memsave.callbacks.presets import PRESETS
from lightning_memsave.planner.catalog import method


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_begins_with_what_is_always_right(name: str) -> None:
    names = [type(callback).__name__ for callback in preset(name)]
    assert names[:2] == ["EarlyZeroGrad", "AllocatorSettings"]
    assert "ActivationCheckpointing" in names
    assert len(set(names)) == len(names)


def test_the_presets_are_the_four_of_the_contract() -> None:
    assert list(PRESETS) == ["basic", "qlora", "long_context", "full_finetune"]
    assert type(preset("qlora")[2]) is lightning_memsave.QLoRA
    assert preset("full_finetune")[-1].name == "adamw_8bit"


def test_basic_is_made_of_exact_methods_only() -> None:
    assert {method(name).numerics for name, _ in PRESETS["basic"].members} == {"exact"}


def test_every_call_gives_fresh_callbacks() -> None:
    first, second = preset("basic"), preset("basic")
    assert not {id(c) for c in first} & {id(c) for c in second}


@pytest.mark.parametrize("asked", ["qlroa", "QLoRA", "", None])
def test_an_unknown_name_lists_the_presets(asked: str) -> None:
    with pytest.raises(ConfigurationError, match=r"not a preset.*'basic', 'qlora', 'long_context', 'full_finetune'"):
        preset(asked)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'full_finetune'"):
        preset("full-finetune")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_an_unchanged_module(name: str) -> None:
    module = LitLM(lr=1e-2)
    make_trainer(max_epochs=3, callbacks=preset(name)).fit(module, make_loader())
    first, *_, last = (sum(module.losses[i : i + 3]) for i in (0, 3, 6))
    assert last < first


def test_basic_leaves_every_loss_bitwise_the_same() -> None:
    plain, saved = LitLM(), LitLM()
    make_trainer().fit(plain, make_loader())
    make_trainer(callbacks=preset("basic")).fit(saved, make_loader())
    assert saved.losses == plain.losses
