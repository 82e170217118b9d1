"""An optimizer stepped inside backward does what it does after it, with one gradient alive at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TinyLM, Tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memsave import ConfigurationError
from lightning_memsave.memory.tracker import track_memory
from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.release import Clipping, GradientReleaser
from lightning_memsave.optim.swap import swap_optimizers

IDS = Tokens(num_rows=48).ids.split(8)
Make = Callable[[Any], torch.optim.Optimizer]


def model(**options: Any) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(**{"tied": True, **options})


def loss_of(net: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def groups(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.parameters())
    return [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-3},
    ]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(
    make: Make = adamw,
    *,
    released: bool,
    clip: Clipping | None = None,
    window: int = 1,
    accumulate: Any = "refuse",
    loss: Callable[..., Tensor] = loss_of,
    net: nn.Module | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train on six batches; a loop as a user writes it, with or without the releaser."""
    net = model() if net is None else net
    optimizer = make(groups(net))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    release = GradientReleaser(optimizer, module=net, accumulate=accumulate) if released else None
    for number, ids in enumerate(IDS):
        value = loss(net, ids) if loss is loss_of else loss(net, ids, number)
        last = (number + 1) % window == 0 or number + 1 == len(IDS)
        if release is not None:
            release.backward(value, clip=clip, last=last)
        else:
            value.backward()
            if last and clip is not None:
                _clip(optimizer, clip)
        if last:
            assert not released or all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if release is not None:
        release.close()
    return net, optimizer


def _clip(optimizer: torch.optim.Optimizer, clip: Clipping) -> None:
    """Clip as Lightning does: norms are summed in the order of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if clip.kind == "value":
        nn.utils.clip_grad_value_(parameters, clip.limit)
    elif clip.kind == "two_pass":
        nn.utils.clip_grad_norm_(parameters, clip.limit)
    else:
        for p in parameters:
            nn.utils.clip_grad_norm_([p], clip.limit)


def assert_same(a: tuple[nn.Module, torch.optim.Optimizer], b: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    assert _flat(a[0].state_dict()) == _flat(b[0].state_dict())
    assert _flat(a[1].state_dict()) == _flat(b[1].state_dict())


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flat(item) for item in value]
    return (value.dtype, value.tolist()) if isinstance(value, Tensor) else value


# -- every optimizer ---------------------------------------------------------------------------------------------------
STOCK: dict[str, Make] = {
    "AdamW": adamw,
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p, lr=1e-3)
        for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
    },
}


@pytest.mark.parametrize("name", STOCK)
def test_every_optimizer_of_torch_trains_bit_by_bit_as_without(name) -> None:
    assert_same(train(STOCK[name], released=True), train(STOCK[name], released=False))


@pytest.mark.parametrize("name", [n for n, row in OPTIMIZERS.items() if row.library == "bitsandbytes"])
def test_optimizers_of_bitsandbytes_keep_the_width_of_each_tensor(name) -> None:
    # a norm and the embedding keep 32-bit state, which is looked up by place; 8-bit needs 4096 values
    def run(released: bool) -> Any:
        net = model(width=128)
        made: list[torch.optim.Optimizer] = []

        def make(parameters: Any) -> torch.optim.Optimizer:
            made.append(swap_optimizers(adamw(parameters), net, OPTIMIZERS[name], options={}, keep_32bit="auto")[0])
            return made[0]

        return train(make, released=released, net=net)

    found, expected = run(True), run(False)
    assert_same(found, expected)
    dtypes = {t.dtype for s in found[1].state.values() for k, t in s.items() if k == "state1"}
    assert dtypes == {torch.float32} | ({torch.uint8} if "8bit" in name else set())


def test_a_users_override_of_bitsandbytes_stays_in_force() -> None:
    import bitsandbytes as bnb

    manager = bnb.optim.GlobalOptimManager.get_instance()

    def run(released: bool) -> Any:
        net = model(width=128, tied=False)
        manager.register_module_override(net.head, "weight", {"optim_bits": 32})
        return train(lambda p: bnb.optim.AdamW8bit(p, lr=1e-2), released=released, net=net)

    try:
        found, expected = run(True), run(False)
    finally:
        manager.initialize()
    assert_same(found, expected)
    assert found[1].state[found[0].head.weight]["state1"].dtype == torch.float32
    assert found[1].state[found[0].embedding.weight]["state1"].dtype == torch.uint8


# -- bytes -------------------------------------------------------------------------------------------------------------
def test_only_the_gradient_that_is_stepped_is_alive() -> None:
    net = model()
    alive: list[int] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            alive.append(sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))
            return super().step(closure)

    optimizer = Watched(groups(net), lr=0.1)
    release = GradientReleaser(optimizer)
    release.backward(loss_of(net, IDS[0]))
    assert sorted(alive) == sorted(p.nbytes for p in net.parameters())
    release.close()


def test_the_peak_is_that_of_a_backward_that_keeps_no_gradient() -> None:
    def peak(mode: str) -> int:
        net = model(width=128, depth=4)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)  # updates in place: no temporaries
        release = GradientReleaser(optimizer) if mode == "released" else None
        if mode == "dropped":
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with track_memory(net, optimizers=[optimizer], inputs=IDS[0]) as tracker:
            loss = loss_of(net, IDS[0][:2, :5])
            loss.backward() if release is None else release.backward(loss)
            optimizer.step()
        if release is not None:
            release.close()
        return tracker.measurement().peak_bytes

    whole = sum(p.nbytes for p in model(width=128, depth=4).parameters())
    assert peak("released") == peak("dropped")
    assert peak("plain") - peak("released") > 0.8 * whole


# -- clipping ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["value", "two_pass", "per_parameter"])
@pytest.mark.parametrize("window", [1, 4])
def test_clipping_is_that_of_torch(kind, window) -> None:
    clip = Clipping(limit=1e-3 if kind == "value" else 0.05, kind=kind)
    expected = train(released=False, clip=clip, window=window)
    for accumulate in ("host", "device"):
        assert_same(train(released=True, clip=clip, window=window, accumulate=accumulate), expected)
    unclipped = train(released=False, window=window)
    assert _flat(expected[0].state_dict()) != _flat(unclipped[0].state_dict()), "the limit must have had an effect"


def test_two_passes_draw_the_same_dropout_in_recomputed_blocks() -> None:
    class Recomputed(TinyLM):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    def run(released: bool) -> Any:
        torch.manual_seed(0)
        net = Recomputed(dropout=0.2)
        return train(released=released, clip=Clipping(limit=0.05, kind="two_pass"), net=net)

    assert_same(run(True), run(False))


def test_a_model_without_a_gradient_is_not_clipped_by_nothing() -> None:
    p = nn.Parameter(torch.ones(2))
    release = GradientReleaser(torch.optim.SGD([p], lr=1.0))
    release.backward(torch.zeros((), requires_grad=True), clip=Clipping(limit=1.0, kind="two_pass"))
    assert torch.equal(p, torch.ones(2))
    release.close()


# -- accumulation ------------------------------------------------------------------------------------------------------
def _sometimes(net: Any, ids: Tensor, number: int) -> Tensor:
    """Leave the last block out in every second batch, as a mixture of experts does."""
    x = net.blocks[0](net.embedding(ids[:, :-1]))
    x = net.blocks[1](x) if number % 2 == 0 else x
    return nn.functional.cross_entropy(net.head(net.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("accumulate", ["host", "device"])
@pytest.mark.parametrize("kind", [None, "two_pass", "value"])
@pytest.mark.parametrize("window", [2, 4])
def test_parameters_without_a_gradient_in_the_last_batch_are_stepped_too(accumulate, kind, window) -> None:
    clip = None if kind is None else Clipping(limit=0.01, kind=kind)
    found = train(released=True, clip=clip, window=window, accumulate=accumulate, loss=_sometimes)
    assert_same(found, train(released=False, clip=clip, window=window, loss=_sometimes))


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_16_bit_gradients_are_added_up_as_torch_does(accumulate) -> None:
    found = train(released=True, window=3, accumulate=accumulate, net=model().bfloat16())
    assert_same(found, train(released=False, window=3, net=model().bfloat16()))


def test_host_buffers_are_made_once_and_hold_every_gradient() -> None:
    net = model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1), accumulate="host")
    release.backward(loss_of(net, IDS[0]), last=False)
    assert all(p.grad is None for p in net.parameters())
    buffers = {key: buffer.data_ptr() for key, buffer in release._held._buffers.items()}
    assert sum(b.nbytes for b in release._held._buffers.values()) == sum(p.nbytes for p in net.parameters())
    release.backward(loss_of(net, IDS[1]))
    release.backward(loss_of(net, IDS[2]), last=False)
    assert {key: buffer.data_ptr() for key, buffer in release._held._buffers.items()} == buffers
    release.close()
    assert not release._held._buffers


@pytest.mark.parametrize("accumulate", ["host", "device"])
def test_what_is_held_can_be_dropped_or_stepped_without_a_backward(accumulate) -> None:
    clip = Clipping(limit=0.05, kind="two_pass")
    net, twin = model(), model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1), accumulate=accumulate)
    release.backward(loss_of(net, IDS[0]), last=False)
    release.drop()
    release.flush(clip)  # nothing is held
    assert _flat(net.state_dict()) == _flat(twin.state_dict())
    release.backward(loss_of(net, IDS[1]), last=False)
    release.flush(clip)
    release.close()
    optimizer = torch.optim.SGD(groups(twin), lr=0.1)
    loss_of(twin, IDS[1]).backward()
    _clip(optimizer, clip)
    optimizer.step()
    assert _flat(net.state_dict()) == _flat(twin.state_dict())


def test_accumulation_is_refused_unless_it_was_chosen() -> None:
    net = model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1))
    with pytest.raises(ConfigurationError, match=r"accumulate='host' \(host memory\) or accumulate='device'"):
        release.backward(loss_of(net, IDS[0]), last=False)
    release.close()


def test_sparse_gradients_are_stepped_and_held_on_the_device_only() -> None:
    def run(released: bool, window: int = 1, accumulate: Any = "refuse") -> Any:
        torch.manual_seed(0)
        net = nn.Embedding(64, 8, sparse=True)
        return train(
            lambda p: torch.optim.SparseAdam([p[0]["params"][0]], lr=1e-2),
            released=released,
            window=window,
            accumulate=accumulate,
            net=net,
            loss=lambda net, ids, _: (net(ids) ** 2).mean(),
        )

    assert_same(run(True), run(False))
    assert_same(run(True, 3, "device"), run(False, 3))
    with pytest.raises(ConfigurationError, match="sparse gradients cannot be accumulated in host memory"):
        run(True, 3, "host")


# -- what belongs to the whole step ------------------------------------------------------------------------------------
class Counting(torch.optim.SGD):
    """Counts its steps in the groups and in an attribute, as many third-party optimizers do, and uses both."""

    count = 0

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / group["step"] / self.count)


def test_counters_of_an_optimizer_advance_once_a_step() -> None:
    found, expected = train(Counting, released=True), train(Counting, released=False)
    assert_same(found, expected)
    assert found[1].count == expected[1].count == len(IDS)


class Adapting(torch.optim.SGD):
    """Adapts one number of a group to all gradients."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            seen = sum(float(p.grad.abs().sum()) for p in group["params"] if p.grad is not None)
            group["seen"] = group.get("seen", 0.0) + seen
        super().step(closure)


def test_a_number_that_all_parameters_share_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"Adapting keeps state that belongs to no parameter.*'seen'"):
        train(lambda p: Adapting(p, lr=0.1), released=True)


def test_step_hooks_run_once_a_step() -> None:
    calls: list[str] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = adamw(parameters)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        return optimizer

    train(make, released=True)
    assert calls == ["before", "after"] * len(IDS)


def test_what_wraps_step_on_the_instance_sees_each_parameter_alone() -> None:
    net = model()
    optimizer = adamw(groups(net))
    seen: list[list[Tensor]] = []
    inner = optimizer.step

    def step(closure: Any = None) -> Any:
        seen.append([p for group in optimizer.param_groups for p in group["params"]])
        return inner(closure)

    optimizer.step = step
    release = GradientReleaser(optimizer)
    release.backward(loss_of(net, IDS[0]))
    release.close()
    assert all(len(parameters) == 1 for parameters in seen)
    assert {id(p) for parameters in seen for p in parameters} == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("library", ["torch", "bitsandbytes"])
def test_the_groups_are_whole_again_after_an_error_in_a_step(library, monkeypatch) -> None:
    import bitsandbytes as bnb

    net = model()
    optimizer = adamw(groups(net)) if library == "torch" else bnb.optim.AdamW8bit(groups(net))
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    listed = optimizer.param_groups
    hooks = optimizer._optimizer_step_pre_hooks
    release = GradientReleaser(optimizer)
    monkeypatch.setattr(optimizer, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        release.backward(loss_of(net, IDS[0]))
    release.close()
    assert optimizer.param_groups is listed
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before
    assert optimizer._optimizer_step_pre_hooks is hooks


# -- refused ----------------------------------------------------------------------------------------------------------
def _named(name: str, base: type = torch.optim.SGD) -> Make:
    return lambda p: type(name, (base,), {})(p, lr=0.1)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:
        return super().step(closure)


class SharedState(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.state["k"] = torch.tensor([0])


REFUSED: dict[str, tuple[Make, str]] = {
    "LBFGS": (lambda p: torch.optim.LBFGS(p[0]["params"]), "LBFGS cannot.*evaluates the closure several times"),
    "AdamWScheduleFree": (_named("AdamWScheduleFree"), "averages the weights"),
    "Prodigy": (_named("Prodigy"), "gradients of all parameters"),
    "DAdaptAdam": (_named("DAdaptAdam"), "gradients of all parameters"),
    "closure": (lambda p: NeedsClosure(p, lr=0.1), "evaluates the loss again"),
    "state": (SharedState, "state that belongs to no parameter"),
    "norm": (lambda p: torch.optim.SGD([{**g, "max_grad_norm": 1.0} for g in p], lr=0.1), "norm of all gradients"),
    "differentiable": (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "needs every gradient to stay"),
    "no optimizer": (lambda p: object(), "object is not a torch.optim.Optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_at_once_is_refused_with_the_reason(name) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        GradientReleaser(make(groups(model())))


def _twice(loss: Tensor, **options: Any) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("clip", [None, Clipping(limit=1.0, kind="two_pass")])
def test_a_second_gradient_in_one_backward_is_refused_by_name(clip) -> None:
    scale = nn.ParameterDict({"scale": nn.Parameter(torch.ones(4))})  # its value is not needed in backward
    release = GradientReleaser(torch.optim.SGD(scale.parameters(), lr=0.1), module=scale)
    with pytest.raises(ConfigurationError, match="scale got its gradient in two parts"):
        release.backward((scale["scale"] * torch.ones(4)).sum(), run=_twice, clip=clip)
    release.close()


def test_a_second_backward_through_stepped_weights_is_refused() -> None:
    net = model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1), module=net)
    with pytest.raises(ConfigurationError, match="this graph was run through before"):
        release.backward(loss_of(net, IDS[0]), run=_twice)
    release.close()


def test_reentrant_checkpointing_of_a_shared_weight_is_refused() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    release = GradientReleaser(torch.optim.SGD(linear.parameters(), lr=0.1), module=linear)
    x = torch.randn(2, 8, requires_grad=True)
    loss = linear(checkpoint(linear, x, use_reentrant=True)).sum()
    with pytest.raises(ConfigurationError, match=r"(weight|bias) got its gradient in two parts.*use_reentrant"):
        release.backward(loss)
    release.close()


def test_a_weight_that_is_read_after_its_step_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    release = GradientReleaser(torch.optim.SGD([weight], lr=0.1))
    x = torch.ones(3, requires_grad=True)
    loss = (torch.exp(x * weight.detach()) * weight).sum()
    with pytest.raises(ConfigurationError, match="read by the backward after its gradient was complete"):
        release.backward(loss)
    release.close()


def test_another_error_in_a_backward_stays_what_it_is() -> None:
    net = model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1))
    loss = loss_of(net, IDS[0])
    release.backward(loss)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        release.backward(loss)
    loss_of(net, IDS[0]).backward()  # no longer ours
    assert all(p.grad is not None for p in net.parameters())
    release.close()


# -- a training that changes -------------------------------------------------------------------------------------------
def test_layers_unfrozen_and_groups_added_in_training_are_released() -> None:
    def run(released: bool) -> Any:
        net = model()
        net.blocks.requires_grad_(False)
        optimizer = adamw([p for p in net.parameters() if p.requires_grad])
        frozen = list(net.blocks[0].parameters())
        optimizer.add_param_group({"params": frozen, "lr": 1e-3})
        release = GradientReleaser(optimizer) if released else None
        for number, ids in enumerate(IDS):
            if number == 2:
                net.blocks[0].requires_grad_(True)
            if number == 4:
                net.blocks[1].requires_grad_(True)
                optimizer.add_param_group({"params": list(net.blocks[1].parameters()), "lr": 1e-4})
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # replaces the groups
            loss = loss_of(net, ids)
            if release is None:
                loss.backward()
            else:
                release.backward(loss)
                assert all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        if release is not None:
            release.close()
        return net, optimizer

    assert_same(run(True), run(False))


def test_a_backward_that_is_not_ours_leaves_its_gradients() -> None:
    net = model()
    release = GradientReleaser(torch.optim.SGD(groups(net), lr=0.1))
    release.backward(loss_of(net, IDS[0]))
    before = _flat(net.state_dict())
    loss_of(net, IDS[1]).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert _flat(net.state_dict()) == before
    release.close()


def test_closing_takes_every_hook_off_and_may_be_repeated() -> None:
    net = model()
    optimizer = adamw(groups(net))
    release = GradientReleaser(optimizer)
    release.backward(loss_of(net, IDS[0]))
    assert all(p._post_accumulate_grad_hooks for p in net.parameters())
    release.close()
    release.close()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_hooks_of_parameters_that_left_the_optimizer_are_taken_off() -> None:
    net = model()
    optimizer = torch.optim.SGD(groups(net), lr=0.1)
    release = GradientReleaser(optimizer)
    release.backward(loss_of(net, IDS[0]))
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    release.backward(loss_of(net, IDS[1]))
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["embedding.weight"]
    release.close()


def test_a_marked_gradient_shows_whether_zero_grad_frees() -> None:
    net = model()
    optimizer = torch.optim.SGD(groups(net), lr=0.1)
    release = GradientReleaser(optimizer)
    for frees in (True, False):
        release.mark()
        assert sum(p.grad is not None for p in net.parameters()) == 1
        optimizer.zero_grad(set_to_none=frees)
        assert release.unmark() is not frees
        assert all(p.grad is None for p in net.parameters())
    release.close()


def test_it_runs_under_fabric() -> None:
    from lightning.fabric import Fabric

    def run(released: bool) -> list[float]:
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        net = model()
        raw = adamw(groups(net))
        wrapped, optimizer = fabric.setup(net, raw)
        release = GradientReleaser(raw) if released else None
        losses = []
        for ids in IDS:
            loss = loss_of(wrapped, ids)
            if release is None:
                fabric.backward(loss)
            else:
                release.backward(loss, run=fabric.backward)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if release is not None:
            release.close()
        return losses

    assert run(True) == run(False)
    assert all(math.isfinite(loss) for loss in run(True))
