"""The tracker's numbers, exact in bytes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyLM
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory.ledger import CATEGORIES
from lightning_memsave.memory.tracker import track_memory

# 4 -> 8 -> 2 in fp32, batch 16. Bytes by hand:
WEIGHTS = (4 * 8 + 8 + 8 * 2 + 2) * 4
INPUTS = 16 * 4 * 4
HIDDEN = 16 * 8 * 4  # of each of: Linear's result, ReLU's result, and their gradients
SCALAR = 4


def make_mlp(device="cpu"):
    return nn.Sequential(nn.Linear(4, 8, device=device), nn.ReLU(), nn.Linear(8, 2, device=device))


def measure_step(model, batch, optimizer=None, loss=lambda out: out.sum()):
    with track_memory(model, optimizers=[optimizer] if optimizer else [], inputs=batch) as tracker:
        loss(model(batch)).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return tracker.measurement()


def nonzero(by_category):
    return {name: nbytes for name, nbytes in by_category.items() if nbytes}


def test_the_peak_of_an_mlp_is_the_sum_done_by_hand():
    found = measure_step(make_mlp(), torch.ones(16, 4))
    # The peak is in ReLU's backward: its result is still saved, both hidden gradients exist, and so do the gradients
    # of the second layer. The loss and the seed of backward are a scalar each.
    expected = {
        "weights": WEIGHTS,
        "inputs": INPUTS,
        "activations": HIDDEN + 2 * SCALAR,
        "temporaries": 2 * HIDDEN,
        "gradients": (8 * 2 + 2) * 4,
    }
    assert nonzero(found.by_category) == expected
    assert found.peak_bytes == sum(expected.values())
    assert tuple(found.by_category) == CATEGORIES
    # Forward peaks in ReLU: what it reads is not freed yet.
    assert found.by_phase == {"forward": WEIGHTS + INPUTS + 2 * HIDDEN, "backward": found.peak_bytes}
    assert found.saved_for_backward_bytes == HIDDEN + 2 * SCALAR


def test_every_sum_is_the_peak_and_modules_have_their_own_bytes():
    found = measure_step(make_mlp(), torch.ones(16, 4))
    assert sum(found.by_category.values()) == found.peak_bytes
    assert sum(sum(row.values()) for row in found.by_module.values()) == found.peak_bytes
    assert found.by_module == {
        "1": {"activations": HIDDEN, "temporaries": HIDDEN},
        "2": {"weights": 72, "temporaries": HIDDEN, "gradients": 72},
        "": {"inputs": INPUTS, "activations": 2 * SCALAR},
        "0": {"weights": 160},
    }


def test_optimizer_state_is_state_from_its_first_byte():
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    first = measure_step(model, torch.ones(16, 4), optimizer)
    state = 2 * WEIGHTS + 4 * SCALAR  # two moments and one step counter a parameter
    second = measure_step(model, torch.ones(16, 4), optimizer)
    assert second.by_category["optimizer_state"] == state
    assert first.by_category["optimizer_state"] == 0  # its peak comes before the step
    assert second.peak_bytes == first.peak_bytes + state
    assert second.by_module["0"]["optimizer_state"] == 2 * 160 + 2 * SCALAR
    assert set(second.by_phase) == {"forward", "backward", "optimizer"}


def test_gradients_held_through_the_next_forward_are_seen():
    model = make_mlp()
    measure_step(model, torch.ones(16, 4))
    held = measure_step(model, torch.ones(16, 4))
    assert held.by_module["0"]["gradients"] == 160
    assert held.by_category["gradients"] == WEIGHTS


def test_tied_weights_and_views_count_once():
    torch.manual_seed(0)
    plain, tied = TinyLM(depth=1), TinyLM(depth=1, tied=True)
    ids = torch.zeros(2, 8, dtype=torch.long)
    one, two = measure_step(tied, ids), measure_step(plain, ids)
    assert two.by_category["weights"] - one.by_category["weights"] == 64 * 64 * 4
    assert one.by_category["inputs"] == 2 * 8 * 8


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_meta_and_fake_tensors_give_the_same_bytes_as_real_ones(device):
    real = measure_step(make_mlp(), torch.ones(16, 4))
    if device == "meta":
        found = measure_step(make_mlp("meta"), torch.ones(16, 4, device="meta"))
    else:
        with FakeTensorMode():
            found = measure_step(make_mlp(), torch.ones(16, 4))
    assert (found.peak_bytes, found.by_category, found.by_module) == (
        real.peak_bytes,
        real.by_category,
        real.by_module,
    )
    assert found.device == ("meta" if device == "meta" else "cpu")


def checkpointed(model, use_reentrant=False):
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=use_reentrant)
    return model


@pytest.mark.parametrize("variant", ["plain", "checkpoint", "reentrant", "autocast"])
def test_the_peak_is_the_one_torch_counts(variant):
    """``MemTracker`` is torch's own (private) counter: categories differ by definition, the total may not."""
    torch.manual_seed(0)
    model = TinyLM(depth=3, dropout=0.1)
    if variant in ("checkpoint", "reentrant"):
        checkpointed(model, use_reentrant=variant == "reentrant")
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(4, 16, dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with track_memory(model, optimizers=[optimizer], inputs=ids) as tracker:
        step()
    theirs = MemTracker()
    theirs.track_external(model, optimizer, ids)
    with theirs:
        step()
    (total,) = [row["Total"] for row in theirs.get_tracker_snapshot("peak").values()]
    assert tracker.measurement().peak_bytes == total


def test_recomputed_activations_belong_to_their_modules():
    torch.manual_seed(0)
    ids = torch.zeros(4, 16, dtype=torch.long)
    token_bytes = 4 * 16 * 64 * 4
    plain = measure_step(TinyLM(depth=3), ids, loss=lambda out: out.sum())
    recomputed = measure_step(checkpointed(TinyLM(depth=3)), ids, loss=lambda out: out.sum())
    assert plain.by_module["blocks.0.up"]["activations"] == 4 * token_bytes
    # Only the block whose backward runs holds its inner activations at the peak: here the last one to be recomputed.
    up = [recomputed.by_module[f"blocks.{i}.up"].get("activations", 0) for i in range(3)]
    assert sorted(up) == [0, 0, 4 * token_bytes]
    assert recomputed.by_phase["backward"] > recomputed.by_phase["forward"]
    # Between forward and backward a checkpointed block keeps its input only: the embedding, and each block's result.
    norm = token_bytes + 2 * 4 * 16 * 4
    assert recomputed.saved_for_backward_bytes == 4 * token_bytes + norm + 2 * SCALAR
    assert plain.saved_for_backward_bytes > 5 * recomputed.saved_for_backward_bytes


def test_closures_are_forward_and_backward_not_optimizer():
    model, batch = make_mlp(), torch.ones(16, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(batch).pow(2).sum()
        loss.backward()
        return loss

    with track_memory(model, optimizers=[optimizer], inputs=batch) as tracker:
        optimizer.step(closure)
    found = tracker.measurement()
    assert set(found.by_phase) == {"forward", "backward", "optimizer"}
    assert found.by_phase["backward"] == found.peak_bytes
    assert found.by_category["optimizer_state"] > 0


def test_double_backward_keeps_the_first_graph_as_activations():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.ones(16, 4, requires_grad=True)
    with track_memory(model, inputs=x) as tracker:
        energy = model(x).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        (force.pow(2).sum() + energy).backward()
    found = tracker.measurement()
    assert found.by_category["activations"] > 2 * HIDDEN  # the first graph's and the second's
    assert found.by_phase["backward"] == found.peak_bytes
    assert found.by_category["inputs"] == INPUTS


def test_a_second_backward_through_one_graph_is_followed():
    model, batch = make_mlp(), torch.ones(16, 4)
    with track_memory(model, inputs=batch) as tracker:
        loss = model(batch).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    found = tracker.measurement()
    # The peak is in the second one: the gradients of the first are held, its own only pass by on their way into them.
    expected = {
        "weights": WEIGHTS,
        "inputs": INPUTS,
        "gradients": WEIGHTS,
        "activations": HIDDEN + 2 * SCALAR,
        "temporaries": 2 * HIDDEN,
    }
    assert nonzero(found.by_category) == expected


def test_freed_gradients_of_a_step_inside_backward_are_gradients():
    model = make_mlp()
    optimizers = {p: torch.optim.AdamW([p]) for p in model.parameters()}

    def release(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(release) for p in model.parameters()]
    with track_memory(model, inputs=torch.ones(16, 4)) as tracker:
        model(torch.ones(16, 4)).sum().backward()
    for handle in handles:
        handle.remove()
    found = tracker.measurement()
    settled = [(block.module, block.settle(tracker.log.marks)) for block, change, _ in tracker.log.events if change > 0]
    assert settled.count(("0", "gradients")) == 2
    assert settled.count(("2", "gradients")) == 2
    assert "optimizer" in found.by_phase


def test_buffers_and_frozen_parameters_are_frozen_weights():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    model[0].requires_grad_(False)
    found = measure_step(model, torch.ones(16, 4))
    assert found.by_category["weights"] == 2 * 8 * 4
    assert found.by_category["frozen_weights"] == (4 * 8 + 8 + 8 + 8) * 4 + 8  # and BatchNorm's int64 counter
    model[0].requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(16, 4)).sum().backward()
    optimizer.step()
    model[0].requires_grad_(False)
    stepped = measure_step(model, torch.ones(16, 4), optimizer)  # toggled for a while, but an optimizer trains it
    assert stepped.by_category["weights"] == (4 * 8 + 8 + 2 * 8) * 4


def test_a_frozen_weight_that_an_optimizer_lists_stays_a_frozen_weight():
    model = nn.Linear(4, 8)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    with track_memory(model, optimizers=[optimizer]) as tracker:
        model(torch.ones(1, 4)).sum().backward()
    found = tracker.measurement().by_category
    assert (found["weights"], found["frozen_weights"]) == (4 * 8 * 4, 8 * 4)


def test_quantization_state_of_4bit_weights_is_frozen_weights():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 256, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    model = nn.Sequential(layer, nn.Linear(256, 4, bias=False))
    found = measure_step(model, torch.ones(8, 256))
    packed = 256 * 256 // 2
    blocks = 256 * 256 // 64
    absmax = blocks + 4 * blocks // 256 + 4  # one byte a block, fp32 a 256 blocks, one offset
    codes = 16 * 4 + 256 * 4
    assert found.by_category["frozen_weights"] == packed + absmax + codes
    assert found.by_module["0"]["frozen_weights"] == found.by_category["frozen_weights"]


def test_sparse_gradients_count_indices_and_values():
    model = nn.Embedding(100, 8, sparse=True)
    found = measure_step(model, torch.tensor([1, 2, 3]), torch.optim.SGD(model.parameters(), lr=0.1))
    assert found.by_category["gradients"] == 3 * 8 + 3 * 8 * 4


def test_resized_storages_are_followed():
    """FSDP frees unsharded parameters through their storage."""
    model = nn.Linear(4, 4)
    with track_memory(model) as tracker:
        buffer = torch.empty(1000)
        buffer.untyped_storage().resize_(0)
        model(torch.ones(1, 4)).sum().backward()
        buffer.untyped_storage().resize_(400)
    live = [change for block, change, _ in tracker.log.events if abs(change) in (4000, 400)]
    assert live == [4000, -4000, 400]
    before = torch.UntypedStorage.resize_
    assert "resize_" not in torch.UntypedStorage.__dict__
    assert before is torch._C.StorageBase.resize_


def test_plain_tensors_of_modules_are_other():
    model = make_mlp()
    model.cache = torch.zeros(10)
    model.history = [torch.zeros(5), {"x": torch.zeros(5)}]
    assert measure_step(model, torch.ones(16, 4)).by_category["other"] == 80


def test_tensors_found_on_the_way_are_other_from_then_on():
    model, constant = make_mlp(), torch.zeros(25)
    with track_memory(model, inputs=torch.ones(16, 4)) as tracker:
        loss = model(torch.ones(16, 4)).sum() * 2.0 + (constant * 3.0).sum()
        loss.backward()
    assert tracker.measurement().by_category["other"] == 100


def test_nothing_is_left_behind():
    model = make_mlp()
    tables = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_forward_hooks_always_called,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    before = [dict(table) for table in tables]
    copied = None

    def killed():
        nonlocal copied
        with track_memory(model, inputs=torch.ones(16, 4)):
            copied = copy.deepcopy(model)
            model(torch.ones(16, 4)).sum().backward()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        killed()
    assert [dict(table) for table in tables] == before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in copied.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())
    assert torch._C._len_torch_dispatch_stack() == 0
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_exceptions_inside_modules_do_not_shift_later_modules():
    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("inner")

    model = nn.ModuleDict({"bad": nn.Sequential(Raises()), "good": make_mlp()})
    with track_memory(model) as tracker:
        with pytest.raises(ValueError, match="inner"):
            model["bad"](torch.ones(16, 4))
        model["good"](torch.ones(16, 4)).sum().backward()
    assert tracker.measurement().by_module["good.1"]["activations"] == HIDDEN


def test_numbers_do_not_change_what_is_computed():
    torch.manual_seed(0)
    model = TinyLM(depth=2, dropout=0.1)
    twin, ids = copy.deepcopy(model), torch.zeros(4, 16, dtype=torch.long)
    torch.manual_seed(1)
    twin(ids).sum().backward()
    torch.manual_seed(1)
    measure_step(model, ids)
    for one, two in zip(model.parameters(), twin.parameters()):
        assert torch.equal(one.grad, two.grad)


def test_a_tracker_is_for_one_step():
    tracker = track_memory(make_mlp())
    with tracker:
        pass
    with pytest.raises(ConfigurationError, match="make a new one"), tracker:
        pass


def test_lazy_parameters_are_weights_from_their_first_forward():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once a process that lazy modules are under development
        model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    with track_memory(model, inputs=(batch := torch.ones(16, 4))) as tracker:
        model(batch).sum().backward()
    found = tracker.measurement().by_category
    assert (found["weights"], found["inputs"]) == ((4 * 8 + 8) * 4, INPUTS)
    made = [(b.settle(tracker.log.marks), b.module, change) for b, change, _ in tracker.log.events]
    assert ("gradients", "0", 4 * 8 * 4) in made


def test_weights_that_are_brought_in_for_a_forward_are_weights():
    model, batch = make_mlp(), torch.ones(16, 4)
    home = model[0].weight.data

    def bring(module, args):
        module.weight.data = home.clone()

    handle = model[0].register_forward_pre_hook(bring)
    with track_memory(model, inputs=batch) as tracker:
        model(batch).sum().backward()
    handle.remove()
    assert tracker.measurement().by_module["0"]["weights"] == (4 * 8 + 8) * 4 + 4 * 8 * 4  # at home, and brought in


def test_validation_holds_its_phase():
    model, batch = make_mlp(), torch.ones(16, 4)
    with track_memory(model, inputs=batch) as tracker:
        tracker.set_phase("validation")
        model(batch).sum().backward()
    found = tracker.measurement()
    assert set(found.by_phase) == {"validation"}
    assert found.by_category["activations"] == 0  # nothing is kept for a training backward


def test_compiled_modules_are_counted_uncompiled():
    model = make_mlp()
    expected = measure_step(make_mlp(), torch.ones(16, 4))
    model.compile(backend="aot_eager")
    model(torch.ones(16, 4)).sum().backward()
    model.zero_grad()
    assert measure_step(model, torch.ones(16, 4)).peak_bytes == expected.peak_bytes


def test_what_the_device_held_before_is_in_the_peak():
    model = make_mlp()
    with track_memory(model, inputs=torch.ones(16, 4)) as tracker:
        model(torch.ones(16, 4)).sum().backward()
    without = tracker.measurement()
    tracker.log.untracked_bytes = 1000
    found = tracker.measurement()
    assert found.peak_bytes == without.peak_bytes + 1000
    assert found.by_category["other"] == 1000
    assert found.by_module["(untracked)"] == {"other": 1000}
