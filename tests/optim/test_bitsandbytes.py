"""What is added to bitsandbytes' optimizers: width per tensor, sliced CPU steps, checkpoints, paging after a resume."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import nn

from lightning_memsave._imports import require
from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.optim import _bitsandbytes
from lightning_memsave.optim.registry import OPTIMIZERS

bitsandbytes = require("bitsandbytes", "this test")
NAMES = [name for name, row in OPTIMIZERS.items() if row.library == "bitsandbytes"]


def make(name: str, *shapes: tuple[int, ...], keep: int = 0):
    """Return parameters and their optimizer; the first ``keep`` ones hold 32-bit state."""
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    kept = {id(p) for p in made[:keep]}
    return made, OPTIMIZERS[name].build([{"params": made, "lr": 1e-2, "weight_decay": 0.1}], {}, kept)


def step(parameters, optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_width_is_chosen_per_tensor_and_not_for_the_process() -> None:
    parameters, optimizer = make("adamw_8bit", (64, 64), (64, 64), keep=1)
    others, other = make("adamw_8bit", (64, 64))
    step(parameters, optimizer)
    step(others, other)
    assert [optimizer.state[p]["state1"].dtype for p in parameters] == [torch.float32, torch.uint8]
    assert other.state[others[0]]["state1"].dtype == torch.uint8
    shared = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert shared.pid2config == {}
    assert shared.index2config == {}


def test_a_kept_parameter_that_joins_later_is_kept_too() -> None:
    late = nn.Parameter(torch.randn(64, 64))
    early = nn.Parameter(torch.randn(64, 64))
    optimizer = OPTIMIZERS["adamw_8bit"].build([{"params": [early], "lr": 1e-2}], {}, {id(late)})
    optimizer.add_param_group({"params": [late], "lr": 1e-3})
    step([early, late], optimizer)
    assert optimizer.state[early]["state1"].dtype == torch.uint8
    assert optimizer.state[late]["state1"].dtype == torch.float32


def test_the_users_own_overrides_win() -> None:
    p = nn.Parameter(torch.randn(64, 64))
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.override_config(p, "optim_bits", 8)
    try:
        optimizer = OPTIMIZERS["adamw_8bit"].build([{"params": [p], "lr": 1e-2}], {}, {id(p)})
        step([p], optimizer)
    finally:
        manager.initialize()
    assert optimizer.state[p]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_sliced_step_gives_the_same_bits(name, keep, monkeypatch) -> None:
    shape = (3 * 4096 + 100,)
    whole, reference = make(name, shape, keep=keep)
    for seed in range(3):
        step(whole, reference, seed)
    monkeypatch.setattr(_bitsandbytes, "_SLICE", 4096)
    sliced, optimizer = make(name, shape, keep=keep)
    for seed in range(3):
        step(sliced, optimizer, seed)
    assert torch.equal(whole[0], sliced[0])
    assert set(optimizer.state) == set(sliced)
    for key, value in reference.state[whole[0]].items():
        other = optimizer.state[sliced[0]][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_step_is_given_slices_so_that_its_copies_are_small(name, keep, monkeypatch) -> None:
    # the copies are made inside of bitsandbytes' operators, where no mode sees them: look at what they are given
    given: list[int] = []
    for operator in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        inner = getattr(bitsandbytes.functional, operator)

        def spy(kind: str, gradient: torch.Tensor, *args, inner=inner, **kwargs) -> None:
            given.append(gradient.numel())
            inner(kind, gradient, *args, **kwargs)

        monkeypatch.setattr(bitsandbytes.functional, operator, spy)
    parameters, optimizer = make(name, (2 * _bitsandbytes._SLICE + 7,), keep=keep)
    step(parameters, optimizer)
    assert given == [_bitsandbytes._SLICE, _bitsandbytes._SLICE, 7]


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_parameters_follow_the_contiguous_ones(name) -> None:
    weight = torch.randn(8, 4, 12, 12)
    plain, odd = nn.Parameter(weight.clone()), nn.Parameter(weight.to(memory_format=torch.channels_last))
    gradient = torch.randn_like(weight)
    for p in (plain, odd):
        optimizer = OPTIMIZERS[name].build([{"params": [p], "lr": 1e-2}], {}, {id(p)})
        p.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(plain, odd)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_with_weights_only_and_continues_bit_exactly(name) -> None:
    shapes = [(64, 80), (63, 67), (16,)]
    parameters, optimizer = make(name, *shapes, keep=1)
    step(parameters, optimizer, 0)
    file = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "p": [p.detach() for p in parameters]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make(name, *shapes, keep=1)
    for p, value in zip(resumed, saved["p"], strict=True):
        p.data.copy_(value)
    other.load_state_dict(saved["o"])
    for seed in (1, 2):
        step(parameters, optimizer, seed)
        step(resumed, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


def test_the_tables_are_shared_again_after_a_resume() -> None:
    parameters, optimizer = make("adamw_8bit", (64, 64), (64, 64))
    step(parameters, optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    resumed, other = make("adamw_8bit", (64, 64), (64, 64))
    other.load_state_dict(state_dict)
    tables = {other.state[p]["qmap1"].data_ptr() for p in resumed}
    assert tables == {other.name2qmap["dynamic"].data_ptr()}


@pytest.mark.parametrize(
    ("written", "read"), [("adamw", "adamw_8bit"), ("lion_8bit", "adamw_8bit"), ("adamw_8bit", "lion")]
)
def test_another_optimizers_state_is_refused_with_both_names(written, read) -> None:
    p = nn.Parameter(torch.randn(64, 64))
    if written == "adamw":
        old = torch.optim.AdamW([p])
    else:
        old = OPTIMIZERS[written].build([{"params": [p], "lr": 1e-2}], {}, ())
    step([p], old)
    _, new = make(read, (64, 64))
    with pytest.raises(CheckpointMismatchError, match=f"{OPTIMIZERS[read].title} needs .*state1"):
        new.load_state_dict(old.state_dict())


def test_moments_are_paged_again_after_a_resume_and_never_on_the_device_whole(monkeypatch) -> None:
    made: list[torch.Tensor] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = torch.empty(shape, dtype=dtype, device="cpu")
        buffer.is_paged, buffer.page_deviceid = True, device.index
        made.append(buffer)
        return buffer

    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(_bitsandbytes, "_pages", lambda optimizer, p: optimizer.is_paged and p.numel() >= 100_000)
    parameters, optimizer = make("paged_adamw_8bit", (400, 300), (64, 64))
    step(parameters, optimizer)
    optimizer.is_paged = True
    monkeypatch.setattr(optimizer.page_mng, "paged_tensors", [])
    optimizer.load_state_dict(optimizer.state_dict())
    large, small = (optimizer.state[p] for p in parameters)
    assert [large["state1"] is made[0], large["state2"] is made[1], len(made)] == [True, True, 2]
    assert optimizer.page_mng.paged_tensors == made
    assert not hasattr(small["state1"], "is_paged")
    _optimizer_to_device(optimizer, torch.device("meta"))  # what Lightning does after it loaded an optimizer
    assert [large["state1"] is made[0], large["state2"] is made[1]] == [True, True]
    assert small["state1"].is_meta


def test_a_checkpoint_does_not_say_that_its_tensors_are_paged() -> None:
    parameters, optimizer = make("paged_adamw_8bit", (64, 64))
    step(parameters, optimizer)
    moment = optimizer.state[parameters[0]]["state1"]
    moment.is_paged, moment.page_deviceid = True, 0
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["state"][0]["__bnb_optimizer_quant_state__"]["state1"]
    assert torch.equal(saved, moment)
    assert not hasattr(saved, "is_paged")
    assert moment.is_paged


def test_paging_is_off_on_the_cpu_without_a_warning() -> None:
    parameters, optimizer = make("paged_adamw_32bit", (400, 300))
    step(parameters, optimizer)  # warnings are errors in the tests
    assert not optimizer.is_paged
