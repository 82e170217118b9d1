"""Saved-for-backward bytes, exact."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_memsave.memory.saved import record_saved_activations, saved_activation_bytes

BATCH, WIDTH = 8, 16
ROW = BATCH * WIDTH * 4


class Block(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.checkpointed = checkpointed
        self.net = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False) if self.checkpointed else self.net(x)


def test_three_blocks_save_what_the_formula_says():
    # A block saves its input and ReLU's result (which the second Linear saves too: one storage): 1 + 4 rows.
    model = nn.Sequential(*[Block() for _ in range(3)])
    assert saved_activation_bytes(model, None, torch.ones(BATCH, WIDTH)) == 3 * (1 + 4) * ROW


def test_three_checkpointed_blocks_save_their_inputs_only():
    model = nn.Sequential(*[Block(checkpointed=True) for _ in range(3)])
    assert saved_activation_bytes(model, None, torch.ones(BATCH, WIDTH)) == 3 * ROW


def test_parameters_and_buffers_are_not_activations():
    model = nn.Linear(WIDTH, WIDTH)
    x = torch.ones(BATCH, WIDTH, requires_grad=True)  # so that the weight is saved too
    assert saved_activation_bytes(model, None, x) == ROW


def test_any_callable_can_be_counted():
    model = nn.Linear(WIDTH, WIDTH)
    x = torch.ones(BATCH, WIDTH)
    assert saved_activation_bytes(model, lambda batch: model(batch).relu().sum(), x) == 2 * ROW


def test_storages_count_once_however_often_they_are_saved():
    model = nn.Linear(WIDTH, WIDTH)
    with record_saved_activations(model) as saved:
        y = model(torch.ones(BATCH, WIDTH))
        (y * y).sum() + (y[:4] * y[4:]).sum()
    assert saved.num_bytes == 2 * ROW
    assert saved.num_storages == 2


def test_quantization_state_is_not_an_activation():
    bnb = __import__("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.ones(2, 64, requires_grad=True)
    assert saved_activation_bytes(layer, None, x) == 0
