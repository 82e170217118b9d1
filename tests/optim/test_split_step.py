"""The user's own optimizer on bf16 weights: fp32 arithmetic and state, one bucket at a time, nothing else changed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_memsave.errors import CheckpointMismatchError
from lightning_memsave.optim import master_step
from lightning_memsave.optim.master_step import MasterStep, step_problems
from lightning_memsave.optim.master_weights import Masters, first_write, make_masters
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.split_weights import attach_correction

SHAPES = [(40, 50), (7,), (3000,), (8, 4, 3, 3), ()]
WAYS = ["stochastic", "split", "kahan"]
Maker = Callable[[Any], torch.optim.Optimizer]
OWN: dict[str, Maker] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 0.05 for shape in SHAPES]


def cast(masters: Masters, values: list[Tensor]) -> list[nn.Parameter]:
    parameters = []
    for value in values:
        weight, rest = first_write(masters, value) if masters.key else (value.to(torch.bfloat16), None)
        parameters.append(nn.Parameter(weight))
        if rest is not None:
            attach_correction(parameters[-1], rest)
    return parameters


def give_gradients(parameters: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-2).to(torch.bfloat16).to(p.dtype)


def run(parameters: list[Any], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_gradients(parameters, step)
        optimizer.step()


def joined(hooked: MasterStep, parameters: list[nn.Parameter]) -> list[Tensor]:
    key = hooked.masters.key
    return [hooked.masters.read(p.detach(), hooked.optimizer.state[p].get(key)) for p in parameters]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough for some tensors together, and too small for others."""
    monkeypatch.setattr(master_step, "_BUCKET_ON_CPU", 700)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("name", OWN)
def test_with_sixteen_bits_every_optimizer_trains_as_on_fp32_weights(name) -> None:
    wide = [nn.Parameter(value) for value in start()]
    reference = OWN[name](wide)
    masters = make_masters("split", torch.int16)
    narrow = cast(masters, start())
    mine = OWN[name](narrow)
    hooked = MasterStep(mine, masters)
    run(wide, reference, 6)
    run(narrow, mine, 6)
    for p, value in zip(wide, joined(hooked, narrow)):
        # six steps; worst seen 3.7e-9 (one step of the fp32 pattern, at ties)
        assert (p.detach() - value).abs().max() <= 3e-8
    for p, q in zip(wide, narrow):
        own = {key: value for key, value in mine.state[q].items() if key != "correction"}
        assert set(own) == set(reference.state[p])
        for key, value in own.items():
            if isinstance(value, Tensor):
                expected = reference.state[p][key]
                assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("way", ["split", "kahan"])  # the random numbers of stochastic rounding come in another order
@pytest.mark.parametrize("name", ["AdamW", "momentum", "Adafactor"])
def test_the_size_of_the_buckets_changes_no_bit(name, way, monkeypatch) -> None:
    results = []
    for size in (2**20, 700, 64):
        monkeypatch.setattr(master_step, "_BUCKET_ON_CPU", size)
        masters = make_masters(way, torch.int8)
        parameters = cast(masters, start())
        optimizer = OWN[name](parameters)
        hooked = MasterStep(optimizer, masters)
        run(parameters, optimizer, 3)
        results.append(joined(hooked, parameters))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("way", WAYS)
def test_an_8bit_optimizer_keeps_its_own_state_and_width(way) -> None:
    net = nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128)).to(torch.bfloat16)
    parameters = list(net.parameters())
    optimizer = OPTIMIZERS["adamw_8bit"].build([{"params": parameters, "lr": 1e-3}], {}, {id(net[0].weight)})
    MasterStep(optimizer, make_masters(way, torch.int8))
    before = [p.detach().clone() for p in parameters]
    run(parameters, optimizer, 3)
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before))
    assert optimizer.state[net[0].weight]["state1"].dtype == torch.float32  # its place in the group says so
    assert optimizer.state[net[1].weight]["state1"].dtype == torch.uint8
    assert optimizer.state[net[1].weight]["step"] == 3


def test_fp32_parameters_in_the_same_groups_are_stepped_as_ever() -> None:
    masters = make_masters("split", torch.int8)
    narrow, wide = cast(masters, start()), [nn.Parameter(value) for value in start()]
    alone = [nn.Parameter(value) for value in start()]
    mixed = OWN["AdamW"]([*narrow, *wide])
    MasterStep(mixed, masters)
    plain = OWN["AdamW"](alone)
    for step in range(4):
        give_gradients(narrow, step)
        give_gradients(wide, step)
        give_gradients(alone, step)
        mixed.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(wide, alone))
    assert set(mixed.state[wide[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_parameters_without_gradients_and_empty_steps_are_fine() -> None:
    masters = make_masters("split", torch.int8)
    parameters = cast(masters, start())
    optimizer = OWN["AdamW"](parameters)
    MasterStep(optimizer, masters)
    optimizer.step()
    assert not optimizer.state
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert list(optimizer.state) == [parameters[0]]


def test_hooks_and_closures_run_once_and_schedulers_see_the_step() -> None:
    masters = make_masters("split", torch.int8)
    parameters = cast(masters, [*start(), *start()])
    optimizer = OWN["AdamW"](parameters)
    scheduler = CosineAnnealingLR(optimizer, 10)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    hooked = MasterStep(optimizer, masters)

    def closure() -> Tensor:
        seen.append("closure")
        assert torch.is_grad_enabled()
        give_gradients(parameters, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["pre", "closure", "post"]
    scheduler.step()  # warns where it did not see the step
    own = optimizer.__dict__["step"]
    hooked.close()
    hooked.close()
    assert optimizer.__dict__["step"] is not own, "the scheduler's own mark is back"
    assert "load_state_dict" not in optimizer.__dict__
    assert not optimizer._optimizer_state_dict_post_hooks


def test_numbers_of_a_group_advance_once_a_step() -> None:
    class Counting(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        assert p.dtype == torch.float32
                        p.sub_(p.grad, alpha=group["lr"] * group["step"])

    masters = make_masters("split", torch.int8)
    values = [torch.randn(600) for _ in range(4)]
    parameters = cast(masters, values)
    optimizer = Counting(parameters, lr=1e-2)
    master_step_before = [v.clone() for v in values]
    hooked = MasterStep(optimizer, masters)
    size = master_step._BUCKET_ON_CPU
    try:
        master_step._BUCKET_ON_CPU = 600
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        master_step._BUCKET_ON_CPU = size
    assert optimizer.param_groups[0]["step"] == 2
    assert optimizer.calls == 2
    for value, before in zip(joined(hooked, parameters), master_step_before):
        torch.testing.assert_close(value, before - 1e-2 * 3, rtol=1e-4, atol=1e-5)


def test_one_parameter_at_a_time_is_the_same_step_with_sixteen_bits() -> None:
    # what GradientRelease does
    results = []
    for narrow in (False, True):
        masters = make_masters("split", torch.int16)
        parameters = cast(masters, start())
        optimizer = OWN["AdamW"](parameters)
        hooked = MasterStep(optimizer, masters)
        for step in range(3):
            give_gradients(parameters, step)
            if not narrow:
                optimizer.step()
                continue
            groups = optimizer.param_groups
            for p in reversed(parameters):
                optimizer.param_groups = [{**groups[0], "params": [p]}]
                optimizer.step()
            optimizer.param_groups = groups
        results.append(joined(hooked, parameters))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_an_error_in_the_step_leaves_groups_and_state_as_they_were() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no step")

    masters = make_masters("split", torch.int8)
    parameters = cast(masters, start())
    optimizer = Failing(parameters, lr=1e-2)
    MasterStep(optimizer, masters)
    give_gradients(parameters, 0)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    assert set(map(id, optimizer.state)) <= set(map(id, parameters))
    assert all(torch.equal(p, b) for p, b in zip(parameters, before))


@pytest.mark.parametrize("way", WAYS)
def test_temporaries_are_a_few_buckets(way, monkeypatch) -> None:
    monkeypatch.setattr(master_step, "_BUCKET_ON_CPU", 2**14)
    masters = make_masters(way, torch.int8)
    parameters = cast(masters, [torch.randn(2**18), *(torch.randn(2**12) for _ in range(16))])
    optimizer = torch.optim.AdamW(parameters)
    MasterStep(optimizer, masters)
    run(parameters, optimizer, 1)
    with LiveBytes() as live:
        optimizer.step()
    bucket = 4 * 2**14
    assert live.peak <= 8 * bucket, f"{live.peak / bucket:.1f} buckets"


# -- checkpoints -------------------------------------------------------------------------------------------------------
def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    result: dict[str, Any] = torch.load(buffer, weights_only=True)
    return result


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "momentum", "SGD", "Adagrad", "Adafactor", "adamw_8bit"])
def test_resume_is_bit_exact(name, way) -> None:
    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer, MasterStep]:
        masters = make_masters(way, torch.int8)
        parameters = cast(masters, [*start(), torch.linspace(-1, 1, 5000)])
        if name == "adamw_8bit":
            optimizer = OPTIMIZERS[name].build([{"params": parameters, "lr": 1e-3}], {}, ())
        else:
            optimizer = OWN[name](parameters)
        return parameters, optimizer, MasterStep(optimizer, masters)

    parameters, optimizer, hooked = make()
    run(parameters, optimizer, 3)
    weights, state, chance = [p.detach().clone() for p in parameters], saved(optimizer), hooked.masters.state_dict()
    run(parameters, optimizer, 3, first=3)

    again, other, other_hooked = make()
    for p, weight in zip(again, weights):
        p.detach().copy_(weight)
    other.load_state_dict(state)
    other_hooked.masters.load_state_dict(chance)
    run(again, other, 3, first=3)
    for p, q in zip(parameters, again):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                assert value.dtype == other.state[q][key].dtype
                assert torch.equal(value, other.state[q][key]), key


@pytest.mark.parametrize("way", ["split", "kahan"])
def test_what_waits_for_its_first_step_is_saved_and_loaded(way) -> None:
    made = []
    for _ in range(2):
        masters = make_masters(way, torch.int8)
        parameters = cast(masters, start())
        optimizer = OWN["AdamW"](parameters)
        made.append((parameters, optimizer, MasterStep(optimizer, masters)))
    parameters, optimizer, hooked = made[0]
    give_gradients(parameters[:2], 0)
    optimizer.step()
    state = saved(optimizer)
    again, other, other_hooked = made[1]
    for p, q in zip(parameters, again):
        q.detach().copy_(p.detach())  # forgets its rest
    other.load_state_dict(state)
    other_hooked.masters.load_state_dict(hooked.masters.state_dict())
    run(parameters, optimizer, 1, first=1)
    run(again, other, 1, first=1)
    assert all(torch.equal(a, b) for a, b in zip(joined(hooked, parameters), joined(other_hooked, again)))


def test_a_checkpoint_of_plain_fp32_training_goes_on() -> None:
    wide = [nn.Parameter(value) for value in start()]
    plain = OWN["AdamW"](wide)
    run(wide, plain, 3)
    masters = make_masters("split", torch.int16)
    narrow = cast(masters, [p.detach() for p in wide])
    optimizer = OWN["AdamW"](narrow)
    hooked = MasterStep(optimizer, masters)
    optimizer.load_state_dict(saved(plain))
    run(wide, plain, 3, first=3)
    run(narrow, optimizer, 3, first=3)
    for p, value in zip(wide, joined(hooked, narrow)):
        assert (p.detach() - value).abs().max() <= 3e-8


@pytest.mark.parametrize(("written", "read"), [("split", "kahan"), ("kahan", "stochastic"), ("split", "stochastic")])
def test_a_checkpoint_of_another_way_is_refused(written, read) -> None:
    masters = make_masters(written, torch.int8)
    parameters = cast(masters, start())
    optimizer = OWN["AdamW"](parameters)
    MasterStep(optimizer, masters)
    run(parameters, optimizer, 1)
    other = OWN["AdamW"](cast(make_masters(read, torch.int8), start()))
    MasterStep(other, make_masters(read, torch.int8))
    with pytest.raises(CheckpointMismatchError, match=rf"kept with {masters.key} .* and this run keeps"):
        other.load_state_dict(optimizer.state_dict())


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_optimizers_that_look_at_everything_are_refused() -> None:
    p = [nn.Parameter(torch.zeros(2))]
    for made, reason in (
        (torch.optim.LBFGS(p), "evaluates the loss several times"),
        (torch.optim.SparseAdam(p), "sparse gradients"),
        (type("AdamWScheduleFree", (torch.optim.SGD,), {})(p, lr=0.1), "moves the weights between steps"),
        (type("Prodigy", (torch.optim.SGD,), {})(p, lr=0.1), "all parameters together"),
    ):
        [problem] = step_problems(made)
        assert reason in problem
        assert "Return torch.optim.AdamW" in problem
    assert all(step_problems(make(p)) == [] for make in OWN.values())
