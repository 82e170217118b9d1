"""Offloaded, narrowed and tiled activations on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_memsave.optim._offload_boundary import CudaBoundary
from lightning_memsave.transforms.checkpoint_blocks import checkpoint_blocks
from lightning_memsave.transforms.offloading import offload_blocks, offloader_of
from lightning_memsave.transforms.saved_precision import compress_blocks
from lightning_memsave.transforms.tiling import tile_modules

pytestmark = pytest.mark.gpu

DEPTH, ROWS, WIDTH = 12, 8192, 1024


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


def make(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(DEPTH)]).to(device, torch.bfloat16)


def step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Return the gradients and the peak of bytes above what was there before."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x).float().square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [p.grad for p in model.parameters()], peak


@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_activations_are_bitwise_equal_and_leave_the_device(cuda, checkpointed):
    plain = make(cuda)
    model, x = copy.deepcopy(plain), torch.randn(ROWS, WIDTH, device=cuda, dtype=torch.bfloat16)
    if checkpointed:
        checkpoint_blocks(plain, ("auto",), policy="full")
        checkpoint_blocks(model, ("auto",), policy="full")
    offload_blocks(model, ("auto",), device="cpu", min_bytes=2**16)
    for _ in range(3):  # buffers are used again
        (expected, before), (found, after) = step(plain, x), step(model, x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    store = offloader_of(model).store
    assert isinstance(store.boundary, CudaBoundary)
    assert store.used_bytes == 0
    block_inputs = (DEPTH - 3) * ROWS * WIDTH * 2
    assert before - after > 0.5 * block_inputs * (1 if checkpointed else 4)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_narrowed_activations_take_less_and_stay_close(cuda, dtype):
    plain = make(cuda)
    model, x = copy.deepcopy(plain), torch.randn(ROWS, WIDTH, device=cuda, dtype=torch.bfloat16)
    compress_blocks(model, ("auto",), dtype=dtype)
    (expected, before), (found, after) = step(plain, x), step(model, x)
    assert after < 0.75 * before
    assert max(float((a - b).float().norm() / a.float().norm()) for a, b in zip(expected, found)) < 0.1


def test_a_tiled_mlp_takes_one_tile_and_gives_the_same_gradients(cuda):
    plain = nn.Sequential(Block()).to(cuda, torch.float32).eval()
    model, x = copy.deepcopy(plain), torch.randn(4 * ROWS, WIDTH, device=cuda)
    tile_modules(model, ["0"], tile_tokens=ROWS // 4)
    (expected, before), (found, after) = step(plain, x), step(model, x)
    assert after < 0.6 * before
    for a, b in zip(expected, found):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4 * float(a.abs().max()))
