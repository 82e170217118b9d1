"""The predicted bytes of optimizer state are the bytes that are there after a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memsave.optim._notes import swapped_state_bytes
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.state_bytes import held_state_bytes, predicted_state_bytes

TORCH_CASES = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adafactor, {}),
]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix with 8-bit state, a ragged one, a small vector, a 4D kernel, a scalar and a frozen matrix."""
    shapes = [(64, 80), (63, 67), (16,), (8, 4, 12, 12), (1,), (70, 70)]
    made = [nn.Parameter(torch.randn(shape, dtype=dtype, device="cpu")) for shape in shapes]
    made[-1].requires_grad_(False)
    return made


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), TORCH_CASES)
def test_prediction_for_torchs_own_optimizers_is_exact(cls, options, dtype) -> None:
    optimizer = cls(parameters(dtype), **options)
    predicted = predicted_state_bytes(optimizer)
    step(optimizer)
    assert predicted == held_state_bytes(optimizer)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_prediction_for_torchs_muon_is_exact() -> None:
    optimizer = torch.optim.Muon([nn.Parameter(torch.randn(8, 12))])
    predicted = predicted_state_bytes(optimizer)
    step(optimizer)
    assert predicted == held_state_bytes(optimizer)


# what changes the state of a row besides its defaults
VARIANTS = {
    **{name: [{"min_8bit_size": 16}] for name in ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")},
    "adafactor": [{"beta1": 0.9}],
    "adamw_split_master": [{"min_8bit_size": 16}, {"correction": "int16"}],
    "galore_adamw": [{"rank": 8}, {"rank": 64}],
    "apollo_adamw": [{"rank": 8}, {"rank": 64}],
}
CASES = [(name, options) for name in OPTIMIZERS for options in ({}, *VARIANTS.get(name, ()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_prediction_of_every_row_is_exact(name, options, dtype) -> None:
    row = OPTIMIZERS[name]
    dtype = torch.bfloat16 if name == "adamw_split_master" else dtype
    made = parameters(dtype)
    kept = {id(made[0])}
    optimizer = row.build([{"params": made, "lr": 1e-3}], options, kept)
    step(optimizer)
    trained = [p for p in made if p.requires_grad]
    tables = row.shared_bytes if any(row.has_narrow_state(p, id(p) in kept, options) for p in trained) else 0
    expected = tables + sum(row.state_bytes(p, id(p) in kept, options) for p in trained)
    assert held_state_bytes(optimizer) == expected
    assert swapped_state_bytes(optimizer, row, options, kept) == expected


def test_the_documented_formulas_hold_for_one_matrix() -> None:
    rows, columns = 1024, 512
    n = rows * columns
    p = torch.zeros(rows, columns)
    held = {name: row.state_bytes(p, False, {}) for name, row in OPTIMIZERS.items() if name != "adamw_split_master"}
    assert held == {
        "adamw_8bit": 2 * n + 8 * n // 256,
        "paged_adamw_8bit": 2 * n + 8 * n // 256,
        "paged_adamw_32bit": 8 * n,
        "lion_8bit": n + 4 * n // 256,
        "lion": 4 * n,
        "adamw_4bit": n + 8 * n // 128,
        "adamw_fp8": 2 * n + 8 * n // 256,
        "adafactor": 4 * (rows + columns),
        "adalomo": 4 * (rows + columns),
        "came": 4 * n + 8 * (rows + columns),
        "adam_mini": 4 * n + 4 * rows,
        "muon": 4 * n,
        "galore_adamw": 128 * (8 * rows + 4 * columns),
        "apollo_adamw": 8 * 256 * rows + 4,
    }


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "adamw_fp8"])
def test_eight_bit_adamw_keeps_at_most_2_1_bytes_a_value(name) -> None:
    p = nn.Parameter(torch.zeros(300, 257))
    optimizer = OPTIMIZERS[name].build([{"params": [p], "lr": 1e-3}], {}, ())
    step(optimizer)
    # the tables of bitsandbytes are 2048 bytes whatever the number of parameters
    assert held_state_bytes(optimizer) - OPTIMIZERS[name].shared_bytes <= 2.1 * p.numel()


def test_a_class_that_is_not_known_has_no_prediction() -> None:
    class Own(torch.optim.SGD):
        pass

    assert predicted_state_bytes(Own([nn.Parameter(torch.zeros(2))], lr=0.1)) is None


def test_a_storage_that_two_entries_share_is_counted_once() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    shared = torch.zeros(10, dtype=torch.float32, device="cpu")
    optimizer.state[torch.zeros(1)] = {"a": shared, "b": [shared[:5], {"c": shared.view(2, 5)}]}
    assert held_state_bytes(optimizer) == 40
