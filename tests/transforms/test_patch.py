"""A forward that belongs to one instance."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from lightning_memsave.transforms._patch import patch_forward


def plus(patch, x):
    return patch.inner(x) + patch.options["amount"]


def test_only_the_instance_changes_and_undo_restores_it() -> None:
    one, other, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    names = list(one.state_dict())
    before = one(x)
    undo = patch_forward(one, plus, amount=1.0)
    assert torch.equal(one(x), before + 1)
    assert "forward" not in other.__dict__
    assert type(one) is nn.Linear
    assert list(one.state_dict()) == names
    undo()
    assert "forward" not in one.__dict__
    assert torch.equal(one(x), before)


def test_a_deep_copy_runs_its_own_weights() -> None:
    module, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    patch_forward(module[0], plus, amount=1.0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            copied[0].weight.zero_()
            copied[0].bias.zero_()
        assert torch.equal(copied(x), torch.ones(1, 2))
    assert not torch.equal(module(x), torch.ones(1, 2))


def test_patches_stack_and_undo_in_any_order() -> None:
    for first_undone in (0, 1):
        module, x = nn.Linear(2, 2), torch.ones(1, 2)
        before = module(x)
        undos = [patch_forward(module, plus, amount=1.0), patch_forward(module, plus, amount=10.0)]
        assert torch.allclose(module(x), before + 11)
        undos[first_undone]()
        assert torch.allclose(module(x), before + (10.0 if first_undone == 0 else 1.0))
        undos[1 - first_undone]()
        assert torch.equal(module(x), before)
