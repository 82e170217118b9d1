"""FP8Precision where there is no fp8: clear refusals, and the conversion with a stand-in for torchao."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import FP8Precision
from lightning_memsave._imports import is_available
from lightning_memsave.errors import (
    ConfigurationError,
    IncompatibleMethodsError,
    MissingDependencyError,
    NothingToTransformError,
)
from lightning_memsave.precision import fp8 as shell
from lightning_memsave.transforms.fp8 import RECIPES, capability_problem, swap_linear_layers


class Float8Linear(nn.Linear):
    """Stands for torchao's layer: the same parameters under the same names."""


@dataclasses.dataclass(frozen=True)
class Float8LinearConfig:
    recipe: str

    @classmethod
    def from_recipe_name(cls, name: str) -> Float8LinearConfig:
        return cls(name)


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool], config: Float8LinearConfig
) -> nn.Module:
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and module_filter_fn(linear, name):
            new = Float8Linear(1, 1)
            new.weight, new.bias, new.config = linear.weight, linear.bias, config  # type: ignore[assignment]
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, new)
    return module


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A torchao with the three names this package calls, and a device that can multiply in fp8."""
    library = ModuleType("torchao.float8")
    for thing in (Float8LinearConfig, convert_to_float8_training, Float8Linear):
        setattr(library, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", library)
    monkeypatch.setattr(shell, "capability_problem", lambda device, recipe: None)
    return library


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("torchao")
def test_linear_layers_are_exchanged_and_train_with_the_same_parameters(recipe) -> None:
    module = LitLM()
    module.net.blocks[0].eval()
    names, modes = list(module.state_dict()), {name: m.training for name, m in module.named_modules()}
    parameters = {name: id(p) for name, p in module.named_parameters()}
    trainer = make_trainer(plugins=[FP8Precision(recipe)], max_epochs=2)
    trainer.fit(module, make_loader())
    assert trainer.precision == "bf16-mixed"
    layers = {name for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert len(layers) == 13
    assert {type(module.get_submodule(name)).__name__ for name in layers} == {"Float8Linear"}
    assert {module.get_submodule(name).config.recipe for name in layers} == {recipe}
    assert list(module.state_dict()) == names
    assert {name: id(p) for name, p in module.named_parameters()} == parameters
    assert {name: m.training for name, m in module.named_modules()} == modes
    assert sum(module.losses[3:]) < sum(module.losses[:3])
    trainer.validate(module, make_loader())  # converts nothing again, and does not say that there is nothing


@pytest.mark.usefixtures("torchao")
def test_the_rest_runs_under_bf16_autocast() -> None:
    class Seen(LitLM):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            return super().training_step(batch, batch_idx)

    make_trainer(plugins=[FP8Precision()]).fit(Seen(), make_loader())


def test_only_plain_layers_whose_sizes_fit_are_exchanged(torchao) -> None:
    class Own(nn.Linear):
        """Does something else."""

    module = nn.ModuleDict(
        {"fits": nn.Linear(32, 16), "narrow": nn.Linear(32, 10), "own": Own(16, 16), "hooked": nn.Linear(16, 16)}
    )
    module["hooked"].register_forward_hook(lambda *_: None)
    swapped, skipped = swap_linear_layers(module, torchao, "rowwise")
    assert swapped == ["fits"]
    assert skipped == ["hooked", "narrow"]
    assert type(module["own"]) is Own


@pytest.mark.usefixtures("torchao")
def test_nothing_to_exchange_is_an_error() -> None:
    with pytest.raises(NothingToTransformError, match=r"none of the 13 linear layers.*multiples of 16.*bf16-mixed"):
        make_trainer(plugins=[FP8Precision()]).fit(LitLM(width=20, vocabulary=30), make_loader(vocabulary=30))


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"recipe='fast'\. Write one of 'rowwise', 'rowwise_with_gw_hp'"):
        FP8Precision("fast")


def test_a_cpu_is_refused_before_torchao_is_asked_for_and_nothing_is_changed() -> None:
    module = LitLM()
    with pytest.raises(ConfigurationError, match=r"need a CUDA GPU.*the run is on cpu.*precision='bf16-mixed'"):
        make_trainer(plugins=[FP8Precision()]).fit(module, make_loader())
    assert "torchao" not in sys.modules
    assert type(module.net.head) is nn.Linear


@pytest.mark.parametrize(
    ("capability", "recipe", "problem"),
    [
        ((9, 0), "rowwise", None),
        ((10, 0), "rowwise_with_gw_hp", None),
        ((8, 9), "tensorwise", None),
        ((8, 9), "rowwise", r"needs compute capability 9\.0, and .* has 8\.9\. Write FP8Precision\('tensorwise'\)"),
        ((8, 0), "rowwise", r"needs compute capability 9\.0, and .* has 8\.0\. Use Trainer\(precision='bf16-mixed'\)"),
        ((7, 5), "tensorwise", r"needs compute capability 8\.9, and .* has 7\.5"),
    ],
)
def test_a_gpu_is_told_what_it_lacks(capability, recipe, problem, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    found = capability_problem(torch.device("cuda", 0), recipe)
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found or "")


@pytest.mark.skipif(is_available("torchao"), reason="torchao is installed")
def test_a_missing_torchao_is_named(monkeypatch) -> None:
    monkeypatch.setattr(shell, "capability_problem", lambda device, recipe: None)
    with pytest.raises(MissingDependencyError, match=r'FP8Precision needs torchao.*"lightning-memsave\[torchao\]"'):
        make_trainer(plugins=[FP8Precision()]).fit(LitLM(), make_loader())


@pytest.mark.parametrize("kind", ["fsdp1", "deepspeed"])
def test_strategies_with_precision_plugins_of_their_own_are_refused(kind, monkeypatch) -> None:
    monkeypatch.setattr("lightning_memsave.callbacks._session.strategy_kind", lambda strategy: kind)
    with pytest.raises(IncompatibleMethodsError, match=f"FP8Precision does not run on the '{kind}' strategy"):
        make_trainer(plugins=[FP8Precision()]).fit(LitLM(), make_loader())
