"""Activations away from the device: bitwise gradients, no weights, one block ahead, nothing left behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers import TinyLM
from live_bytes import LiveBytes
from torch import Tensor, nn

from lightning_memsave.optim._offload_boundary import Boundary
from lightning_memsave.transforms._offload_store import DiskStore, HostStore
from lightning_memsave.transforms.checkpoint_blocks import checkpoint_blocks
from lightning_memsave.transforms.offloading import BlockOffloader, describe_store, offload_blocks, offloader_of


class Faked(Boundary):
    """A host that is another place: what is downloaded is counted, and nothing is shared with it."""

    def __init__(self) -> None:
        self.down = self.up = 0
        self.order: list[str] = []

    def download(self, pairs):
        self.down += sum(source.nbytes for source, _ in pairs)
        self.order += ["down"] * len(pairs)
        return super().download(pairs)

    def upload(self, pairs):
        self.up += sum(source.nbytes for source, _ in pairs)
        self.order += ["up"] * len(pairs)
        return super().upload(pairs)

    def finish(self) -> None:
        self.order.append("finish")


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 64), nn.Linear(64, width), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.sigmoid(self.up(x))))


def make(depth: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Mlp() for _ in range(depth)])


def offload(model: nn.Module, boundary: Boundary | None = None, **options):
    boundary = boundary or Faked()
    stores = []

    def store(device):
        stores.append(HostStore(boundary, options.get("host_budget")))
        return stores[0]

    applied = offload_blocks(model, ("auto",), device="cpu", min_bytes=options.get("min_bytes", 1), make_store=store)
    return applied, boundary


def gradients(model: nn.Module, x: Tensor, **backward) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = model(x).square().sum()
    loss.backward(**backward)
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_gradients_are_bitwise_those_of_the_plain_model(place, checkpointed, tmp_path):
    plain, model, x = make(), make(), torch.randn(4, 6, 32)
    if checkpointed:
        checkpoint_blocks(model, ("auto",), policy="full")
    if place == "host":
        applied, _ = offload(model)
    else:
        applied = offload_blocks(model, ("auto",), device=tmp_path, min_bytes=1)
    for _ in range(2):
        assert_equal(gradients(model, x), gradients(plain, x))
    store = offloader_of(model).store
    assert store.stored > 0
    assert store.used_bytes == 0, "a buffer was not given back"
    applied.undo()
    assert not list(tmp_path.iterdir())
    assert offloader_of(model) is None


def test_exactly_what_the_blocks_save_goes_away_and_nothing_twice():
    depth, rows = 4, 4 * 6
    model, x = make(depth), torch.randn(4, 6, 32)
    _, boundary = offload(model)
    gradients(model, x)
    # up's input, sigmoid's result, which two operations save, and the dropout mask, fp32 on the CPU
    assert boundary.down == depth * 4 * rows * (32 + 64 + 32)
    assert boundary.up == boundary.down


def test_with_checkpointing_the_inputs_alone_go_away():
    depth, rows = 4, 4 * 6
    model, x = make(depth), torch.randn(4, 6, 32)
    checkpoint_blocks(model, ("auto",), policy="full")
    _, boundary = offload(model)
    gradients(model, x)
    assert boundary.down == boundary.up == depth * 4 * rows * 32


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_stay_also_those_that_autocast_has_cast(frozen, autocast):
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + self.blocks[1](x)

    model = Two()
    model.blocks.requires_grad_(not frozen)
    seen = []
    offloader = BlockOffloader(lambda device: HostStore(Faked()), 1)
    pack = offloader._pack
    offloader._pack = lambda t, g, w: (lambda kept: (seen.append(tuple(t.shape)) if kept is not t else None, kept)[1])(
        pack(t, g, w)
    )
    x = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for block in model.blocks:
            with offloader.block(block):
                block(x).sum().backward()
    assert not {(40, 48), (48, 40)} & set(seen)
    assert ((5, 48) in seen) == (not frozen)


def test_the_backward_of_a_block_finds_it_fetched_and_asks_for_the_one_before():
    model, x = make(3), torch.randn(4, 6, 32)
    checkpoint_blocks(model, ("auto",), policy="full")
    _, boundary = offload(model)
    gradients(model, x)
    # forward: three inputs go; backward: the last block's comes, then the one before it while the last is computed
    assert boundary.order == ["down"] * 3 + ["up", "finish", "up", "finish", "up", "finish"]


def test_at_most_two_blocks_are_resident_in_backward():
    depth, rows, width = 8, 2048, 32

    def peak(offloaded: bool) -> int:
        model, x = make(depth), torch.randn(rows, width, requires_grad=True)
        keep = []
        if offloaded:
            boundary = Faked()
            boundary.buffer = lambda size: keep.append(torch.empty(size, dtype=torch.uint8)) or keep[-1]
            offload(model, boundary)
        with LiveBytes(x, *model.parameters()) as live:
            loss = model(x).square().sum()
            loss.backward()
        return live.peak - sum(k.nbytes for k in keep)  # the host is not the device

    saved = 4 * rows * (width + 64 + width)  # of one block
    gradients_bytes = 4 * (depth * (2 * width * 64 + 64 + width) + rows * width)  # the two peaks are at other times
    assert peak(False) - peak(True) >= (depth - 2) * saved - gradients_bytes


def test_a_graph_can_be_used_twice_and_dropped_unused():
    model, plain, x = make(), make(), torch.randn(4, 6, 32)
    offload(model)

    def twice(m: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        y = x.clone().requires_grad_()
        loss = m(y).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [y.grad, *(p.grad for p in m.parameters())]

    assert_equal(twice(model), twice(plain))
    model(x.requires_grad_())  # no backward
    gc.collect()
    assert offloader_of(model).store.used_bytes == 0


def test_interleaved_graphs_and_inference_are_right():
    model, plain = make(), make()
    offload(model)
    results = []
    for m in (model, plain):
        torch.manual_seed(1)
        first, second = (torch.full((4, 6, 32), float(i), requires_grad=True) for i in (1, 2))
        losses = [m(first).sum(), m(second).square().sum()]
        with torch.no_grad():
            m(first)
        for loss in losses:
            loss.backward()
        results.append([first.grad, second.grad, *(p.grad for p in m.parameters())])
    assert_equal(*results)


def test_beyond_the_budget_tensors_stay_and_results_are_the_same():
    model, plain, x = make(), make(), torch.randn(4, 6, 32)
    offload(model, host_budget=10_000)
    assert_equal(gradients(model, x), gradients(plain, x))
    store = offloader_of(model).store
    assert 0 < store.peak_bytes <= 10_000
    assert store.refused > 0
    assert f"{store.refused} stayed on the device, beyond host_budget=9.77 KiB" in describe_store(store)


def test_unused_buffers_of_other_sizes_make_room():
    store = HostStore(Boundary(), 100)
    first = store.put(torch.ones(80, dtype=torch.uint8))
    assert store.put(torch.ones(40, dtype=torch.uint8)) is None
    store.release(first, 80)
    second = store.put(torch.ones(40, dtype=torch.uint8))
    assert second is not None
    assert (store.held_bytes, store.refused) == (40, 1)


def test_small_tensors_and_shapes_that_are_no_plain_memory_stay():
    model, x = make(), torch.randn(2, 2, 32)
    offload(model, min_bytes=2**16)
    gradients(model, x)
    assert offloader_of(model).store is None


def test_views_share_one_copy_and_keep_their_strides(tmp_path):
    offloader = BlockOffloader(lambda device: DiskStore(tmp_path), 1)
    base = torch.randn(8, 6)
    base.requires_grad_()
    module = nn.Identity()
    with offloader.block(module):
        y = base * 2
        out = (y.t() * y.t()).sum() + (y[2:5] * y[2:5]).sum() + (y[:, 1].expand(3, 8) * y[:3].new_ones(3, 8)).sum()
    assert offloader.store.stored == 2 + 0  # y, and the ones
    (grad,) = torch.autograd.grad(out, base)
    plain = base.detach().clone().requires_grad_()
    y = plain * 2
    out = (y.t() * y.t()).sum() + (y[2:5] * y[2:5]).sum() + (y[:, 1].expand(3, 8) * y[:3].new_ones(3, 8)).sum()
    assert torch.equal(grad, torch.autograd.grad(out, plain)[0])
    del out
    offloader.close()
    assert not list(tmp_path.iterdir())


def test_host_memory_is_refused_where_the_module_is_in_it():
    model = make()
    offload_blocks(model, ("auto",), device="cpu", min_bytes=1)
    with pytest.raises(ValueError, match=r"trains on the CPU.*device=<directory>"):
        model(torch.randn(2, 2, 32, requires_grad=True))


def test_copies_of_an_offloaded_model_have_their_own_place(tmp_path):
    model = TinyLM()
    applied = offload_blocks(model, ("auto",), device=tmp_path, min_bytes=1)
    other = copy.deepcopy(model)
    ids = torch.ones(2, 9, dtype=torch.int64)
    model(ids).sum().backward()
    other(ids).sum().backward()
    assert offloader_of(other) is not offloader_of(model)
    assert offloader_of(other).store is not offloader_of(model).store
    applied.undo()
    offloader_of(other).close()
