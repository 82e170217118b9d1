"""bf16 and fp8 weights on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import nn

from lightning_memsave import BF16Precision, FP8Precision, GradientRelease, LowMemoryOptimizer
from lightning_memsave._imports import is_available
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim import split_master
from lightning_memsave.optim.rounding import round_stochastic_into
from lightning_memsave.optim.split_master import SplitMasterAdamW
from lightning_memsave.optim.split_weights import attach_correction, correction_of, draw_correction, join, split
from lightning_memsave.transforms.fp8 import RECIPES, capability_problem

pytestmark = pytest.mark.gpu

WIDE = {"vocabulary": 64, "width": 256, "depth": 2}
# Atomic additions in CUDA's attention and embedding backward come in any order; losses are bf16.
TOLERANCE = 0.05


def fit(module: Any, plugin: Any, *callbacks: Any, **options: Any) -> Any:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(plugins=[plugin], callbacks=[*callbacks], **{"accelerator": "gpu", **options})
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_the_number_format_is_that_of_the_cpu(cuda, dtype) -> None:
    values = torch.randint(-(2**31), 2**31, (2**20,)).to(torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    there = split(values.to(cuda), dtype)
    for a, b in zip(split(values, dtype), there):
        assert torch.equal(a.view(torch.int8), b.cpu().view(torch.int8))
    assert torch.equal(join(*split(values, dtype)).view(torch.int32), join(*there).cpu().view(torch.int32))
    weight = torch.ones(1000, dtype=torch.bfloat16)
    drawn = [draw_correction(w, dtype, torch.Generator().manual_seed(0)).cpu() for w in (weight, weight.to(cuda))]
    assert torch.equal(*drawn)


def test_stochastic_rounding_is_right_on_average(cuda) -> None:
    state = torch.cuda.get_rng_state(cuda)
    values = torch.full((1_000_001,), 1 + 0.3 * 2.0**-7, device=cuda)
    weight = torch.empty(values.shape, dtype=torch.bfloat16, device=cuda)
    round_stochastic_into(values, weight, torch.Generator(cuda).manual_seed(0))
    assert weight.unique().numel() == 2
    assert (weight > 1).double().mean().item() == pytest.approx(0.3, abs=3e-3)  # standard error 4.6e-4
    assert torch.equal(torch.cuda.get_rng_state(cuda), state)


def test_a_correction_follows_its_parameter_to_the_device(cuda) -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    attach_correction(layer.weight, torch.ones(4, 4, dtype=torch.int8))
    layer.to(cuda)
    assert correction_of(layer.weight) is not None
    optimizer = SplitMasterAdamW(layer.parameters())
    layer(torch.ones(1, 4, dtype=torch.bfloat16, device=cuda)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["correction"].device == layer.weight.device
    assert optimizer.num_drawn == 1  # the bias came without


def test_a_step_holds_five_bytes_a_value_and_a_few_blocks(cuda) -> None:
    size = 2**28
    before = torch.cuda.memory_allocated(cuda)
    p = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=cuda))
    attach_correction(p, torch.zeros(size, dtype=torch.int8, device=cuda))
    optimizer = SplitMasterAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = torch.cuda.memory_allocated(cuda) - before - p.grad.nbytes
    assert held / size == pytest.approx(5 + 8 / 256, abs=1e-3)
    torch.cuda.reset_peak_memory_stats(cuda)
    resident = torch.cuda.memory_allocated(cuda)
    optimizer.step()
    assert torch.cuda.max_memory_allocated(cuda) - resident <= 10 * 4 * split_master._BLOCK_ON_ACCELERATOR


@pytest.mark.parametrize("way", ["stochastic", "split", "kahan"])
@pytest.mark.parametrize("name", [None, "adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_every_way_trains_with_the_modules_own_optimizer_and_small_ones(cuda, name, way) -> None:
    module = LitLM(**WIDE, lr=1e-2 if name == "adafactor" else 1e-3)
    fit(module, BF16Precision(way), *([LowMemoryOptimizer(name)] if name else []), max_epochs=4)
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize(("way", "name"), [("stochastic", None), ("split", None), ("split", "adamw_split_master")])
def test_resume_goes_on(cuda, way, name, tmp_path) -> None:
    def callbacks() -> list[Any]:
        return [LowMemoryOptimizer(name)] if name else []

    straight = LitLM(**WIDE)
    fit(straight, BF16Precision(way), *callbacks(), max_epochs=4)
    half = fit(LitLM(**WIDE), BF16Precision(way), *callbacks(), max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    resumed = LitLM(**WIDE)
    trainer = fit(resumed, BF16Precision(way), *callbacks(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.losses == pytest.approx(straight.losses[6:], abs=TOLERANCE)
    [optimizer] = trainer.optimizers
    if way == "split":
        corrections = [state["correction"] for state in optimizer.state.values() if "correction" in state]
        assert {c.dtype for c in corrections} == {torch.int8}
        assert {c.device.type for c in corrections} == {"cuda"}


def test_split_masters_with_released_gradients(cuda) -> None:
    module = LitLM(**WIDE)
    fit(module, BF16Precision("split"), LowMemoryOptimizer("adamw_split_master"), GradientRelease(), max_epochs=4)
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_products_train_or_the_gpu_is_told_what_it_lacks(cuda, recipe) -> None:
    module = LitLM(**WIDE)
    if capability_problem(cuda, recipe):
        with pytest.raises(ConfigurationError, match="compute capability"):
            fit(module, FP8Precision(recipe))
        return
    if not is_available("torchao"):
        pytest.skip("torchao is not installed")
    plain = LitLM(**WIDE)
    make_trainer(accelerator="gpu", precision="bf16-mixed", max_epochs=4).fit(plain, make_loader())
    fit(module, FP8Precision(recipe), max_epochs=4)
    assert {type(m).__name__ for m in module.modules() if isinstance(m, nn.Linear)} == {"Float8Linear"}
    assert module.losses == pytest.approx(plain.losses, abs=0.1)
