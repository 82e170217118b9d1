"""What a recompute must see as the forward saw it, and must not do twice."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from recompute_helpers import (
    Residual,
    Stack,
    compare,
    train,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms.checkpoint_blocks import (
    checkpoint_blocks,
    explain_recompute_errors,
    recompute_counts,
)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_is_replayed_with_its_cache(policy, cache):
    class Amp(Stack):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                return super().forward(super().forward(x))  # every block twice: the second time from the cache

    if policy == "selective" and cache:
        # The weights are cast anew in every call, so that the gradients of two calls are added in fp32, not in bf16.
        plain = Amp(Residual)
        model = copy.deepcopy(plain)
        checkpoint_blocks(model, policy=policy)
        x = torch.randn(4, 8)
        torch.testing.assert_close(train(model, x), train(plain, x), rtol=8e-3, atol=1e-5)  # worst seen 3e-3
    else:
        compare(lambda: Amp(Residual), torch.randn(4, 8), policy)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("norm", ["batch", "cumulative", "instance", "frozen"])
def test_batch_statistics_are_updated_once_per_step(policy, norm):
    def block() -> nn.Module:
        layers = {
            "batch": lambda: nn.BatchNorm2d(4),
            "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
            "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True),
            "frozen": lambda: nn.BatchNorm2d(4).eval(),
        }
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), layers[norm](), nn.ReLU(inplace=True), nn.Dropout2d(0.3))

    model = compare(lambda: Stack(block), torch.randn(2, 4, 6, 6), policy)
    if norm in ("batch", "cumulative"):
        assert model.layers[0][1].num_batches_tracked == 2


class Stateful(nn.Module):
    """Keeps a hidden state as an attribute, a counter, and tensors it writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 8), nn.Linear(8, 8)
        self.hidden: Tensor | None = None
        self.calls = 0
        self.register_buffer("codebook", torch.zeros(8))
        self.plain = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.cell(x, self.hidden)
        self.hidden = hidden.detach()
        y = torch.tanh(self.out(hidden + self.codebook + self.plain)) * self.calls
        self.codebook.mul_(0.9).add_(y.detach().mean(0))
        self.plain += 1
        return y


def test_the_state_of_stateful_layers_is_replayed_and_changed_once():
    model = compare(lambda: Stack(Stateful), torch.randn(4, 8), steps=3)
    assert model.layers[0].calls == 3
    assert torch.equal(model.layers[0].plain, torch.full((8,), 3.0))


def test_spectral_norm_vectors_advance_once_per_step():
    def block() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh())

    compare(lambda: Stack(block), torch.randn(4, 8), steps=3)


def test_random_numbers_of_python_and_numpy_are_replayed():
    class Draws(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if random.random() < 0.5:
                x = x + np.random.rand()
            return super().forward(x) * random.random()

    compare(lambda: Stack(Draws), torch.randn(4, 8), steps=4)


def test_keyword_arguments_nested_outputs_and_none_pass_through():
    class Rich(Residual):
        def forward(self, *, hidden: Tensor, extra: dict[str, Any], scale: float = 1.0) -> Any:  # type: ignore[override]
            y = super().forward(hidden) * scale + extra["shift"][0]
            return {"hidden": y, "pair": (y.sum(), None)}, hidden

    class Caller(Stack):
        def forward(self, x: Tensor) -> Tensor:
            total = x.new_zeros(())
            for layer in self.layers:
                out, same = layer(hidden=x, extra={"shift": (x * 2, "text", None)}, scale=0.5)
                assert same is x
                x, total = out["hidden"], total + out["pair"][0]
            return x + total

    compare(lambda: Caller(Rich), torch.randn(4, 8))


def test_a_shared_block_called_twice_gets_both_gradients():
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = compare(lambda: Twice(Residual), torch.randn(4, 8))
    assert recompute_counts(model)["layers.0"].recomputed == 4


def test_hooks_that_change_arguments_and_results_are_honoured():
    def scale(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] * 2, *args[1:]), kwargs

    def make() -> nn.Module:
        model = Stack(Residual)
        for layer in model.layers:
            layer.register_forward_pre_hook(scale, with_kwargs=True)
            layer.register_forward_hook(lambda m, a, out: out * 3)
            layer.up.register_forward_hook(lambda m, a, out: out + 1)
        return model

    compare(make, torch.randn(4, 8))


def test_hooks_that_are_gone_before_backward_are_replayed():
    class Adapted(Stack):
        def forward(self, x: Tensor) -> Tensor:
            handles = [layer.up.register_forward_hook(lambda m, a, out: out * 2) for layer in self.layers]
            try:
                return super().forward(x)
            finally:
                for handle in handles:
                    handle.remove()

    model = compare(lambda: Adapted(Residual), torch.randn(4, 8))
    assert not model.layers[0].up._forward_hooks


def test_flags_flipped_between_forward_and_backward_do_not_change_the_recompute():
    torch.manual_seed(0)
    grads = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = Stack(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()))
        if recomputed:
            checkpoint_blocks(model)
        x = torch.randn(4, 8, requires_grad=True)
        loss = model(x).sum()
        model.eval().requires_grad_(False)
        loss.backward()
        assert not model.layers[0].training
        assert not model.layers[0][0].weight.requires_grad
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_second_order_gradients_are_equal():
    grads = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model, x = Stack(Residual), torch.randn(4, 8, requires_grad=True)
        if recomputed:
            checkpoint_blocks(model)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        grads.append([p.grad for p in model.parameters()] + [x.grad])
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*grads))


def test_a_second_backward_over_a_retained_graph_recomputes_again():
    grads = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = Stack(Stateful)
        if recomputed:
            checkpoint_blocks(model)
        loss = model(torch.randn(4, 8)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert recompute_counts(model)["layers.0"].recomputed == 2


def test_selective_says_that_it_allows_one_backward():
    class Wide(Residual):
        def __init__(self) -> None:
            super().__init__(64)

    model = Stack(Wide)
    checkpoint_blocks(model, policy="selective")
    loss = model(torch.randn(4, 64)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigurationError, match='policy="selective" allows one backward'), explain_recompute_errors():
        loss.backward()


def test_a_tensor_left_on_a_module_trains_too():
    class Auxiliary(Residual):
        aux: Tensor

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.aux = y.square().mean()
            return y

    class Summed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + sum(layer.aux for layer in self.layers)

    compare(lambda: Summed(Auxiliary), torch.randn(4, 8))


@dataclass
class Graph:
    x: Tensor
    edges: Tensor


def test_batch_objects_that_blocks_write_on_arrive_and_are_replayed():
    class OnObject(Residual):
        def forward(self, graph: Graph) -> Graph:  # type: ignore[override]
            graph.x = super().forward(graph.x + graph.x[graph.edges])
            return graph

    class OnDict(Residual):
        def forward(self, batch: dict[str, Tensor]) -> None:  # type: ignore[override]
            batch["x"] = super().forward(batch["x"])

    class Objects(Stack):
        def forward(self, x: Tensor) -> Tensor:
            graph, batch = Graph(x, torch.arange(len(x)).roll(1)), {"x": x}
            for layer in self.layers:
                layer(graph if isinstance(layer, OnObject) else batch)
            return graph.x + batch["x"]

    compare(lambda: Objects(OnObject), torch.randn(4, 8))
    compare(lambda: Objects(OnDict), torch.randn(4, 8))


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo reads it while it traces
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks_give_equal_gradients(policy, order):
    torch.manual_seed(0)
    plain = Stack(Residual)
    model = copy.deepcopy(plain)
    if order == "after":
        checkpoint_blocks(model, policy=policy)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    if order == "before":
        checkpoint_blocks(model, policy=policy)
    x = torch.randn(4, 8)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain(x).sum().backward()
    model(x).sum().backward()
    torch._dynamo.reset()
    for expected, got in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)  # worst seen 1.2e-7


def test_a_block_that_does_not_repeat_itself_is_named():
    state = {"calls": 0}

    class Changing(Residual):
        def forward(self, x: Tensor) -> Tensor:
            state["calls"] += 1
            return torch.tanh(self.up(x[: 4 if state["calls"] < 3 else 2])).mean(0, keepdim=True).expand(4, -1)[:, :8]

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Changing(), Residual()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = Cut()
    checkpoint_blocks(model, ("one", "two"))
    loss = model(torch.randn(4, 8)).sum()
    state["calls"] = 10
    message = r"recomputing 'one' in backward failed.*Leave 'one' out"
    with pytest.raises(ConfigurationError, match=message) as caught, explain_recompute_errors():
        loss.backward()
    assert "different metadata" in str(caught.value)


def test_other_errors_of_a_backward_pass_unchanged():
    with pytest.raises(RuntimeError, match="mine"), explain_recompute_errors():
        raise RuntimeError("mine")


def test_a_block_that_writes_on_its_input_is_refused_at_its_first_forward():
    model = Stack(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)))
    checkpoint_blocks(model)
    with pytest.raises(ConfigurationError, match=r"'layers.0' \(Sequential\) changes its input of shape \(4, 8\)"):
        model(torch.randn(4, 8))


def test_a_large_buffer_that_changes_late_is_refused():
    class Late(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(2**16 + 1))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                self.table += 1
            return super().forward(x) + self.table[:8]

    model = Stack(Late)
    checkpoint_blocks(model)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"layers.0.table \(65,537 values\)"):
        model(torch.randn(4, 8))


def test_the_models_own_reentrant_checkpoint_inside_a_block_stays_right():
    class Own(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    compare(lambda: Stack(Own), torch.randn(4, 8, requires_grad=True))


def test_function_transforms_are_refused_by_name():
    model = Stack(Residual)
    checkpoint_blocks(model)
    weights = dict(model.named_parameters())
    slope = torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).sum())
    with pytest.raises(ConfigurationError, match=r"'layers.0' was called inside a torch.func transform"):
        slope(weights, torch.randn(2, 8))


def test_jit_tracing_sees_the_plain_forward():
    model = Stack(Residual)
    checkpoint_blocks(model)
    traced = torch.jit.trace(model, torch.randn(2, 8))
    assert all(count.calls == 0 for count in recompute_counts(model).values())
    assert traced(torch.ones(2, 8)).shape == (2, 8)
