"""Blocks and comparisons shared by the tests of recomputed blocks."""

from __future__ import annotations

import copy
import gc
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_memsave.transforms.checkpoint_blocks import checkpoint_blocks, recompute_counts


class Residual(nn.Module):
    """Two linear layers; the last operation saves its input, so a recompute repeats the whole forward."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(F.gelu(self.up(x))))


class Stack(nn.Module):
    """``depth`` blocks in a ``ModuleList``, called in order."""

    def __init__(self, block: Any, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def train(model: nn.Module, x: Tensor, steps: int = 2) -> dict[str, Any]:
    """Return everything a user could see of ``steps`` training steps: losses, gradients, buffers, random states."""
    seen: dict[str, Any] = {}
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    for step in range(steps):
        loss = model(x).float().square().mean()
        loss.backward()
        seen[f"loss {step}"] = loss.detach()
    seen.update({f"grad {k}": p.grad for k, p in model.named_parameters()})
    seen.update({f"buffer {k}": b for k, b in model.named_buffers()})
    seen["torch random"] = torch.get_rng_state()
    seen["random"] = torch.tensor([random.random(), np.random.rand()])
    return seen


def assert_same(plain: dict[str, Any], other: dict[str, Any]) -> None:
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        assert (value is None) == (other[key] is None), key
        assert value is None or torch.equal(value, other[key]), key


def compare(make: Any, x: Tensor, policy: str = "full", patterns: tuple[str, ...] = ("auto",), steps: int = 2) -> Any:
    """Train a model plainly and recomputed; assert that nothing differs and every recomputed block ran again."""
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    checkpoint_blocks(model, patterns, policy=policy)
    assert_same(train(plain, x, steps), train(model, x, steps))
    counts = recompute_counts(model)
    assert counts
    assert all(count.calls == count.recomputed >= steps for count in counts.values())
    return model


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes autograd keeps for the backward of ``model(x)``, weights not counted, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(storages.values())


def backward_flops(model: nn.Module, x: Tensor) -> int:
    loss = model(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def forward_flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


class EmbeddedLM(TinyLM):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(depth=3, **kwargs)


def live_bytes() -> int:
    """Return the bytes of all tensors that are alive, each storage once."""
    gc.collect()
    # Not isinstance: a compiler that ran before leaves fake tensors, which have no storage. Nor have sparse ones.
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
