"""Recomputed blocks: equal numbers, exact bytes, exact arithmetic, and clear refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from recompute_helpers import (
    EmbeddedLM,
    Residual,
    Stack,
    assert_same,
    backward_flops,
    compare,
    forward_flops,
    live_bytes,
    saved_bytes,
    train,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms.checkpoint_blocks import (
    checkpoint_blocks,
    inactive_regularization,
    recompute_counts,
)

POLICIES = ["full", "selective", "every_n"]


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_and_dropout_masks_are_bitwise_equal(policy):
    compare(lambda: EmbeddedLM(dropout=0.2), torch.randint(0, 64, (2, 8)), policy)


def test_full_keeps_only_what_the_blocks_are_given():
    x = torch.randn(4, 8, 8)  # batch * tokens * hidden * itemsize
    model = Stack(Residual)
    plain = saved_bytes(model, x)
    # per block: the input; after `up` and after `gelu` twice the width each; the output of `tanh`
    assert plain == (3 * (2 + 2 + 1) + 1) * 4 * 8 * 8 * 4
    checkpoint_blocks(model)
    assert saved_bytes(model, x) == 3 * 4 * 8 * 8 * 4


def test_every_n_keeps_the_other_blocks_whole():
    x = torch.randn(4, 8, 8)
    model = Stack(Residual, depth=5)
    checkpoint_blocks(model, policy="every_n", every_n=2)
    assert list(recompute_counts(model)) == ["layers.0", "layers.2", "layers.4"]
    # the inputs of all five (of three for the recompute, of two for `up`), and what two blocks keep inside
    assert saved_bytes(model, x) == (5 + 2 * (2 + 2)) * 4 * 8 * 8 * 4


def test_selective_keeps_the_products_and_the_inputs():
    class Wide(Residual):
        def __init__(self) -> None:
            super().__init__(64)

    x = torch.randn(2, 4, 64)
    model = Stack(Wide)
    checkpoint_blocks(model, policy="selective")
    unit = 2 * 4 * 64 * 4
    before = live_bytes()
    loss = model(x).sum()
    # per block: its input and the results of `up` (twice as wide) and `down`; the input of the first is the caller's;
    # the random state of the host
    assert live_bytes() - before - loss.nbytes == (2 + 3 * (2 + 1)) * unit + 3 * torch.get_rng_state().nbytes
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == backward_flops(Stack(Wide), x)  # no product is repeated


def test_the_extra_arithmetic_is_exactly_one_forward_of_the_blocks():
    x = torch.randn(4, 8, 8)
    plain, model = Stack(Residual), Stack(Residual)
    checkpoint_blocks(model)
    assert backward_flops(model, x) - backward_flops(plain, x) == forward_flops(plain, x)


def test_what_follows_the_last_needed_value_is_not_repeated():
    x = torch.randn(4, 8, 8)
    make = lambda: Stack(lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))  # noqa: E731
    plain, model = make(), make()
    checkpoint_blocks(model)
    last_product = 3 * 2 * 4 * 8 * 16 * 8
    assert backward_flops(model, x) - backward_flops(plain, x) == forward_flops(plain, x) - last_product


def test_names_classes_and_state_are_untouched_and_undo_takes_everything_back():
    model = Stack(Residual)
    before = [list(model.state_dict()), [n for n, _ in model.named_parameters()], [type(m) for m in model.modules()]]
    instance = [dict(m.__dict__) for m in model.modules()]
    applied = checkpoint_blocks(model)
    assert applied.num_modules == 3
    assert applied.summary == "recompute 3 Residual in backward"
    assert before == [
        list(model.state_dict()),
        [n for n, _ in model.named_parameters()],
        [type(m) for m in model.modules()],
    ]
    model(torch.randn(2, 8)).sum().backward()
    applied.undo()
    applied.undo()
    assert [m.__dict__.keys() for m in model.modules()] == [d.keys() for d in instance]
    assert recompute_counts(model) == {}


def test_a_deep_copy_and_a_pickle_train_their_own_weights():
    model = Stack(Residual)
    checkpoint_blocks(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(2, 8)).sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert recompute_counts(other)["layers.0"].recomputed == 1


def test_frozen_inputs_and_frozen_weights_train_what_is_left():
    def make() -> nn.Module:
        model = Stack(Residual)
        model.requires_grad_(False)
        model.layers[1].up.bias.requires_grad_(True)
        return model

    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    checkpoint_blocks(model)
    x = torch.randn(4, 8)
    assert_same(train(plain, x), train(model, x))
    counts = recompute_counts(model)
    assert counts["layers.0"].calls == 0  # nothing in it is needed for a gradient: it keeps nothing anyway
    assert counts["layers.1"].recomputed == counts["layers.2"].recomputed == 2
    model.layers[0].requires_grad_(True)  # an encoder unfrozen mid-training
    train(model, x, steps=1)
    assert counts["layers.0"].recomputed == 1


def test_nothing_is_recomputed_where_no_gradient_is_asked_for():
    model = Stack(Residual)
    checkpoint_blocks(model)
    with torch.no_grad():
        model(torch.randn(4, 8))
    with torch.inference_mode():
        model(torch.randn(4, 8))
    assert {(c.calls, c.recomputed, c.passed) for c in recompute_counts(model).values()} == {(0, 0, 2)}


def test_blocks_in_eval_mode_are_recomputed_and_silent_dropout_is_said():
    model = EmbeddedLM().eval()
    checkpoint_blocks(model)
    model(torch.randint(0, 64, (2, 8))).sum().backward()
    assert all(c.recomputed == 1 for c in recompute_counts(model).values())
    assert inactive_regularization(model) == ""  # nothing in it behaves differently in training
    dropping = Stack(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))).eval()
    checkpoint_blocks(dropping)
    assert inactive_regularization(dropping).startswith("3 of 3 recomputed blocks are in eval mode")
    assert inactive_regularization(dropping.train()) == ""


def test_patterns_take_the_outermost_of_nested_matches():
    model = Stack(Residual)
    applied = checkpoint_blocks(model, ("layers.1", "layers.1.up", "layers.2*"))
    assert list(recompute_counts(model)) == ["layers.1", "layers.2"]
    assert applied.num_modules == 2


@pytest.mark.parametrize("second", [("layers.1",), ("layers.1.up",), ("Stack",)])
def test_a_block_is_never_recomputed_by_two_layers_of_checkpointing(second):
    model = nn.Sequential(Stack(Residual))
    checkpoint_blocks(model)
    before = recompute_counts(model).keys()
    with pytest.raises(ConfigurationError, match=r"is recomputed already.*more than twice"):
        checkpoint_blocks(model, tuple(p if p == "Stack" else f"0.{p}" for p in second))
    assert recompute_counts(model).keys() == before


def test_two_calls_may_recompute_different_modules():
    model = Stack(Residual)
    first = checkpoint_blocks(model, ("layers.0",))
    second = checkpoint_blocks(model, ("layers.2",), policy="selective")
    assert list(recompute_counts(model)) == ["layers.0", "layers.2"]
    second.undo()
    first.undo()


def test_a_list_of_modules_is_not_a_block():
    with pytest.raises(NothingToTransformError, match=r"selects 'layers', a ModuleList.*modules='layers\.\*'"):
        checkpoint_blocks(Stack(Residual), ("layers",))


def test_a_model_without_repetition_is_refused_with_what_was_found():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(NothingToTransformError, match=r"no repeated blocks in Sequential.*0 \(Linear\), 1 \(ReLU\)"):
        checkpoint_blocks(model)


def test_torchscript_is_refused():
    model = Stack(Residual)
    model.layers[1] = torch.jit.script(Residual())
    with pytest.raises(ConfigurationError, match=r"'layers.1' is a TorchScript module"):
        checkpoint_blocks(model, ("layers.*[0-9]",))
    assert recompute_counts(model) == {}
