"""An optimizer stepped on the host is the optimizer it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyLM
from live_bytes import LiveBytes
from offload_helpers import FakeBoundary
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.optim._offload_boundary import Boundary, Slot
from lightning_memsave.optim._offload_phases import Parking, storages_of
from lightning_memsave.optim._offload_step import BUCKET_BYTES, MASTER
from lightning_memsave.optim.disk_state import DiskState
from lightning_memsave.optim.offload import HostNeed, check_room, host_need, offload_optimizer
from lightning_memsave.optim.state_bytes import held_state_bytes, predicted_state_bytes

MODES = ["host", "gradients", "overlap", "files", "host files"]
BUCKET = 30_000  # several buckets in a TinyLM of 450 kB


class CountsInGroups(torch.optim.SGD):
    """As optimizers of other libraries do: a counter in each group, advanced once in a step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw_amsgrad_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam_tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "counts_in_groups": lambda p: CountsInGroups(p, lr=1e-2, momentum=0.9),
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    blocks = list(model.blocks.parameters())
    rest = [p for p in model.parameters() if all(p is not b for b in blocks)]
    return [{"params": blocks, "name": "blocks"}, {"params": rest, "lr": 1e-3}]


def offload(optimizer: torch.optim.Optimizer, mode: str, **options: Any) -> Any:
    disk = DiskState("state") if "files" in mode else None
    offloaded = offload_optimizer(
        optimizer,
        boundary=None if mode == "files" else FakeBoundary(),
        disk=disk,
        gradients=mode in ("gradients", "overlap"),
        **{"bucket_bytes": BUCKET, **options},
    )
    if mode == "overlap":
        offloaded.gradients.step_in_backward = True
    return offloaded


def loss_of(model: nn.Module, index: int) -> Tensor:
    x = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(index))
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int] = range(4),
    *,
    micro: int = 1,
    clip: Callable[[], None] = lambda: None,
) -> list[float]:
    """Steps with a schedule; micro-batches are accumulated, the last one inside of the closure, as Lightning does."""
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    losses: list[float] = []

    def backward(index: int) -> Tensor:
        loss = loss_of(model, index)
        loss.backward()
        return loss

    for step in steps:
        optimizer.zero_grad()
        for i in range(micro - 1):
            backward(100 * i + step)

        def closure(step: int = step) -> Tensor:
            loss = backward(step)
            clip()
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
    return losses


def same_state(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def build(maker: str, **network: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyLM(**network)
    return model, MAKERS[maker](two_groups(model))


# -- the same numbers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maker", MAKERS)
def test_weights_state_groups_and_losses_are_those_of_the_plain_optimizer(maker: str, mode: str) -> None:
    plain, optimizer = build(maker)
    losses = train(plain, optimizer, micro=2)
    model, moved = build(maker)
    offloaded = offload(moved, mode)
    assert train(model, moved, micro=2) == losses
    offloaded.close()
    assert all(map(torch.equal, weights(model), weights(plain)))
    assert same_state(moved.state_dict(), optimizer.state_dict())
    assert getattr(moved, "steps", None) == getattr(optimizer, "steps", None)


@pytest.mark.parametrize("mode", MODES)
def test_tied_frozen_and_transposed_parameters_train_as_ever(mode: str) -> None:
    results = []
    for way in (None, mode):
        model, _ = build("adamw", tied=True)
        model.blocks[0].requires_grad_(False)
        up = model.blocks[1].up
        up.weight = nn.Parameter(up.weight.detach().t().contiguous().t())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        offloaded = offload(optimizer, way) if way else None
        train(model, optimizer)
        results.append((weights(model), optimizer.state_dict(), len(optimizer.state)))
        if offloaded:
            offloaded.close()
    assert same_state(results[0], results[1])
    assert results[0][2] == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_unfrozen_later_joins(mode: str) -> None:
    results = []
    for way in (None, mode):
        model, optimizer = build("adamw")
        model.blocks.requires_grad_(False)
        offloaded = offload(optimizer, way) if way else None
        train(model, optimizer, range(2))
        model.blocks.requires_grad_(True)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 1.0})
        train(model, optimizer, range(2, 5))
        results.append((weights(model), optimizer.state_dict()))
        if offloaded:
            offloaded.close()
    assert same_state(results[0], results[1])


@pytest.mark.parametrize("kind", ["norm", "value"])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "overlap"])  # where nothing may come before the step
def test_clipping_sees_all_gradients(mode: str, kind: str) -> None:
    function: Any = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[kind]
    results = []
    for way in (None, mode):
        model, optimizer = build("adamw")
        offloaded = offload(optimizer, way) if way else None
        shown = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = offloaded.gradients if offloaded else None

        def clip(shown: Any = shown, gradients: Any = gradients) -> None:
            function(list(gradients.clippable()) if gradients else shown, 0.01)

        train(model, optimizer, micro=2, clip=clip)
        results.append(weights(model))
        if offloaded:
            offloaded.close()
    assert same_state(results[0], results[1])


# -- where the bytes are -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["host", "gradients", "overlap"])
def test_weights_and_gradients_cross_once_in_a_step_and_nothing_else(mode: str) -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, mode)
    train(model, optimizer, range(1))
    boundary, size = offloaded.host_step.boundary, sum(p.nbytes for p in model.parameters())
    assert (boundary.down, boundary.up) == (2 * size, size)
    offloaded.close()


def test_gradients_are_gone_from_the_device_when_backward_has_made_them() -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, "gradients")
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert offloaded.gradients.nbytes == sum(p.nbytes for p in model.parameters())
    optimizer.step()
    before = offloaded.gradients.nbytes
    train(model, optimizer, range(2))
    assert offloaded.gradients.nbytes == before, "the memory is used again"
    offloaded.close()


def test_staging_is_three_buckets_whatever_the_model() -> None:
    for depth in (2, 6):
        model, optimizer = build("adamw", depth=depth)
        offloaded = offload(optimizer, "host")
        train(model, optimizer, range(2))
        largest = max(p.nbytes for p in model.parameters())
        assert offloaded.host_step.staging_bytes <= 3 * 2 * max(BUCKET, largest) + 64 * 64
        assert offloaded.host_step.boundary.buffers == offloaded.host_step.staging_bytes, "made once"
        offloaded.close()


def test_a_step_makes_no_more_than_the_temporaries_of_one_bucket() -> None:
    peaks = {}
    for mode in ("plain", "host"):
        model, optimizer = build("adamw", depth=6)
        offloaded = offload(optimizer, mode) if mode != "plain" else None
        train(model, optimizer, range(1))
        loss_of(model, 1).backward()
        with LiveBytes() as live:
            optimizer.step()
        peaks[mode] = live.peak
        if offloaded:
            offloaded.close()
    largest = max(p.nbytes for p in model.parameters())
    assert peaks["host"] <= 3 * max(BUCKET, largest)


# -- a real optimizer --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_hooks_run_once_in_a_step_and_see_the_users_groups(mode: str) -> None:
    model, optimizer = build("adamw")
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o is optimizer, len(o.param_groups))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o is optimizer, len(o.param_groups))))
    offloaded = offload(optimizer, mode)
    train(model, optimizer, range(2))
    assert seen == [("before", True, 2), ("after", True, 2)] * 2
    assert isinstance(optimizer, torch.optim.AdamW)
    offloaded.close()
    assert "step" not in {k for k, v in optimizer.__dict__.items() if not hasattr(v, "_wrapped_by_lr_sched")}


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_go_both_ways_at_any_step(mode: str) -> None:
    plain, optimizer = build("adamw")
    train(plain, optimizer, range(4))
    for first, second in ((mode, None), (None, mode), (mode, mode)):
        model, one = build("adamw")
        offloaded = offload(one, first) if first else None
        train(model, one, range(2))
        saved = {"state": one.state_dict(), "model": model.state_dict()}
        torch.save(saved, "checkpoint.pt")
        if offloaded:
            offloaded.close()
        loaded = torch.load("checkpoint.pt", weights_only=True)
        resumed, two = build("adamw")
        offloaded = offload(two, second) if second else None
        resumed.load_state_dict(loaded["model"])
        two.load_state_dict(loaded["state"])
        scheduler = LambdaLR(two, lambda step: 1 / (step + 1))
        scheduler.last_epoch = 2
        for step in (2, 3):
            for group, base in zip(two.param_groups, (1e-2, 1e-3)):
                group["lr"] = base / (step + 1)
            two.zero_grad()
            two.step(lambda step=step: _backward(resumed, step))  # noqa: B023
        if offloaded:
            offloaded.close()
        assert all(map(torch.equal, weights(resumed), weights(plain)))


def _backward(model: nn.Module, index: int) -> Tensor:
    loss = loss_of(model, index)
    loss.backward()
    return loss


def test_loaded_state_stays_on_the_host_whatever_the_device_of_the_parameters() -> None:
    model = nn.Linear(64, 64, device="meta")  # a load onto the device would leave meta tensors
    optimizer = torch.optim.AdamW(model.parameters())
    source = nn.Linear(64, 64)
    plain = torch.optim.AdamW(source.parameters())
    source(torch.ones(1, 64)).sum().backward()
    plain.step()
    offloaded = offload_optimizer(optimizer, boundary=FakeBoundary())
    optimizer.load_state_dict(plain.state_dict())
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
    assert optimizer.param_groups[0]["params"][0] is model.weight
    offloaded.close()


def test_a_load_that_fails_leaves_the_optimizer_as_it_was() -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, "host")
    train(model, optimizer, range(1))
    groups, count = [list(g["params"]) for g in optimizer.param_groups], len(optimizer.state)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert [g["params"] for g in optimizer.param_groups] == groups
    assert len(optimizer.state) == count
    offloaded.close()


def test_what_is_loaded_can_be_held_back_from_who_moves_state_to_the_device() -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, "host")
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    offloaded.hold()
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 0
    offloaded.let_go()
    assert same_state(optimizer.state_dict(), saved)
    offloaded.close()


# -- master weights ----------------------------------------------------------------------------------------------------
def half(maker: str = "adamw", dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = build(maker)
    model.to(dtype)
    return model, MAKERS[maker](two_groups(model))


@pytest.mark.parametrize("mode", ["host", "gradients", "overlap", "host files"])
def test_master_weights_are_fp32_training_with_16_bit_gradients(mode: str) -> None:
    model, optimizer = half()
    offloaded = offload(optimizer, mode, master_weights=True)
    reference = {id(p): p.detach().float().requires_grad_() for p in model.parameters()}
    expected = MAKERS["adamw"]([{**g, "params": [reference[id(p)] for p in g["params"]]} for g in two_groups(model)])
    for step in range(3):
        probe, _ = half()
        probe.load_state_dict(model.state_dict())
        loss_of(probe, step).backward()
        for p, q in zip(model.parameters(), probe.parameters()):
            reference[id(p)].grad = q.grad.float()
        expected.step()
        optimizer.zero_grad()
        optimizer.step(lambda step=step: _backward(model, step))
        for p in model.parameters():
            assert torch.equal(optimizer.state[p][MASTER], reference[id(p)])
            assert torch.equal(p, reference[id(p)].bfloat16())
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    offloaded.close()


def test_a_weight_that_somebody_writes_is_taken_over_and_others_keep_their_low_bits() -> None:
    model, optimizer = half()
    offloaded = offload(optimizer, "host", master_weights=True)
    train(model, optimizer, range(2))
    p = model.blocks[0].up.weight
    before = optimizer.state[p][MASTER].clone()
    with torch.no_grad():
        p[0] = 2.0
    for q in model.parameters():
        q.grad = torch.zeros_like(q)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[p][MASTER][0], torch.full_like(before[0], 2.0))
    assert torch.equal(optimizer.state[p][MASTER][1:], before[1:])
    offloaded.close()


def test_master_weights_resume_bit_exactly_and_are_dropped_by_a_run_without_them() -> None:
    whole, optimizer = half()
    offloaded = offload(optimizer, "host", master_weights=True)
    for step in range(4):
        if step == 2:
            torch.save((whole.state_dict(), optimizer.state_dict()), "half.pt")
        optimizer.zero_grad()
        optimizer.step(lambda step=step: _backward(whole, step))
    offloaded.close()
    weights_, state = torch.load("half.pt", weights_only=True)
    for masters in (True, False):
        model, again = half()
        offloaded = offload(again, "host", master_weights=masters)
        model.load_state_dict(weights_)
        again.load_state_dict(state)
        for step in (2, 3):
            again.zero_grad()
            again.step(lambda step=step: _backward(model, step))  # noqa: B023
        offloaded.close()
        entry = again.state[model.head.weight]
        assert (MASTER in entry) is masters
        assert entry["exp_avg"].dtype == (torch.float32 if masters else torch.bfloat16)
        assert all(map(torch.equal, weights(model), weights(whole))) is masters


# -- refusals ----------------------------------------------------------------------------------------------------------
class ScheduleFreeThing(torch.optim.SGD):
    pass


class Coupled(torch.optim.SGD):
    """Its step depends on all parameters together."""

    def step(self, closure: Any = None) -> Any:
        total = sum(float(p.grad.norm()) for g in self.param_groups for p in g["params"] if p.grad is not None)
        self.param_groups[0]["scale"] = total
        return super().step(closure)


class Global(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.state["global"]["count"] = 1
        return super().step(closure)


ScheduleFreeThing.__module__ = "schedulefree.sgd"
REFUSED = {
    "LBFGS evaluates the closure": lambda p: torch.optim.LBFGS(p),
    "shared by|all parameters share": lambda p: ScheduleFreeThing(p, lr=1.0),
    "capturable=True": lambda p: torch.optim.AdamW(p, capturable=True),
    "differentiable=True": lambda p: torch.optim.AdamW(p, differentiable=True),
    "norm of all gradients": lambda p: torch.optim.SGD([{"params": list(p), "max_grad_norm": 1.0}], lr=1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_stepped_in_parts_is_refused_by_name(message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        offload_optimizer(REFUSED[message](nn.Linear(2, 2).parameters()), boundary=Boundary())


@pytest.mark.parametrize(("cls", "name"), [(Coupled, "scale"), (Global, "global")])
def test_a_step_that_looks_at_all_parameters_is_found_out_in_the_first_one(cls: Any, name: str) -> None:
    model, _ = build("sgd")
    optimizer = cls(model.parameters(), lr=1e-2)
    offload(optimizer, "host")
    with pytest.raises(ConfigurationError, match=f"keeps {name}, which depends on all parameters"):
        train(model, optimizer, range(1))


def test_a_step_that_was_replaced_on_the_instance_is_not_skipped_silently() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    optimizer.step = lambda closure=None: None
    with pytest.raises(ConfigurationError, match="was replaced on the instance"):
        offload_optimizer(optimizer, boundary=Boundary())


def test_sparse_gradients_step_in_files_and_are_refused_across_a_boundary() -> None:
    results = []
    for way in (None, "files", "host"):
        torch.manual_seed(0)
        table = nn.Embedding(64, 64, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-2)
        if way:
            offload(optimizer, way)
        for i in range(2):
            optimizer.zero_grad()
            table(torch.tensor([i, 3])).square().sum().backward()
            if way == "host":
                with pytest.raises(ConfigurationError, match="only dense gradients"):
                    optimizer.step()
                return
            optimizer.step()
        results.append(weights(table))
        assert same_state(results[0], results[-1])


def test_a_second_gradient_after_the_step_in_backward_stops_the_run() -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, "overlap")

    def twice() -> Tensor:
        _backward(model, 0)
        return _backward(model, 1)

    with pytest.raises(ConfigurationError, match="got a gradient again after it was stepped"):
        optimizer.step(twice)
    offloaded.close()


def test_an_error_in_the_thread_that_steps_reaches_the_caller() -> None:
    model, optimizer = build("adamw")
    offloaded = offload(optimizer, "overlap")
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        train(model, optimizer, range(1))
    offloaded.close()


# -- room --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gradients", [False, True])
def test_the_estimate_is_what_is_held(gradients: bool) -> None:
    model, optimizer = build("adamw")
    model.blocks[0].requires_grad_(False)
    need = host_need([optimizer], crosses=True, gradients=gradients)
    offloaded = offload(optimizer, "gradients" if gradients else "host", bucket_bytes=BUCKET_BYTES)
    train(model, optimizer, range(2))
    assert need.state == held_state_bytes(optimizer) == predicted_state_bytes(optimizer)
    assert need.gradients == (offloaded.gradients.nbytes if gradients else 0)
    assert offloaded.host_step.staging_bytes == need.staging
    offloaded.close()


def test_the_estimate_counts_fp32_moments_and_masters_of_16_bit_weights() -> None:
    model, optimizer = half()
    need = host_need([optimizer], crosses=True, master_weights=True)
    offloaded = offload(optimizer, "host", master_weights=True)
    train(model, optimizer, range(1))
    assert need.state + need.masters == held_state_bytes(optimizer)
    assert need.masters == sum(4 * p.numel() for p in model.parameters())
    offloaded.close()


def test_too_little_memory_or_disk_is_refused_with_the_numbers(tmp_path, monkeypatch) -> None:
    from lightning_memsave.optim import offload as module

    monkeypatch.setattr(module, "host_available_bytes", lambda: 10 * 2**30)
    monkeypatch.setattr(module, "disk_free_bytes", lambda directory: 2**30)
    need = HostNeed(state=8 * 2**30, gradients=4 * 2**30)
    with pytest.raises(ConfigurationError, match=r"12.00 GiB of host memory is needed .*moments 8.00 GiB.*10.00 GiB"):
        check_room(need, directory=None, num_local_ranks=1, host_budget=None)
    with pytest.raises(ConfigurationError, match=r"24.00 GiB .* for 2 processes"):
        check_room(need, directory=None, num_local_ranks=2, host_budget=None)
    with pytest.raises(ConfigurationError, match=r"host_budget allows 11.00 GiB"):
        check_room(need, directory=None, num_local_ranks=1, host_budget=11 * 2**30)
    with pytest.raises(ConfigurationError, match=r"8.00 GiB of disk is needed .* 1.00 GiB is free"):
        check_room(need, directory=tmp_path, num_local_ranks=1, host_budget=None)
    check_room(HostNeed(state=None), directory=None, num_local_ranks=1, host_budget=0)


# -- staging and parking -----------------------------------------------------------------------------------------------
def test_a_slot_keeps_shape_layout_and_alignment() -> None:
    slot = Slot(Boundary())
    tensors = [torch.randn(3, 5).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor(1.5)]
    slot.open(t.nbytes for t in tensors)
    views = [slot.like(t) for t in tensors]
    for view, tensor in zip(views, tensors):
        view.copy_(tensor)
        assert view.stride() == tensor.stride()
        assert view.data_ptr() % 64 == slot.like(torch.empty(0)).data_ptr() % 64
    assert all(map(torch.equal, views, tensors))


def test_parked_storages_come_back_bit_for_bit_and_buffers_are_used_again() -> None:
    boundary = FakeBoundary()
    parking = Parking(boundary)
    base = torch.randn(1000)
    view = base[10:20].view(2, 5)
    parameter = nn.Parameter(torch.full((7,), float("nan"), dtype=torch.bfloat16))
    copies = [base.clone(), view.clone(), parameter.view(torch.int16).clone()]
    for _ in range(3):
        parking.park(storages_of({"a": base, "b": [view], "c": parameter}))
        parking.park(storages_of([view]))
        assert (base.untyped_storage().nbytes(), parameter.untyped_storage().nbytes()) == (0, 0)
        assert parking.nbytes == base.nbytes + parameter.nbytes
        parking.bring_back()
        parking.bring_back()
        assert all(map(torch.equal, [base, view, parameter.view(torch.int16)], copies))
    assert boundary.buffers == parking.host_bytes == base.nbytes + parameter.nbytes
    base[10] = 1.0
    assert view[0, 0] == 1.0, "a view is a view still"


def test_parking_beyond_the_budget_moves_nothing() -> None:
    parking, tensor = Parking(FakeBoundary()), torch.ones(100)
    with pytest.raises(ConfigurationError, match="host_budget allows 399 B"):
        parking.park(storages_of(tensor), budget=399)
    assert torch.equal(tensor, torch.ones(100))
