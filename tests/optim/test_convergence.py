"""Every optimizer trains a small language model; those that approximate AdamW follow it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyLM, Tokens
from torch.optim.lr_scheduler import LambdaLR

from lightning_memsave.optim.registry import OPTIMIZERS
from lightning_memsave.optim.swap import swap_optimizers

# what needs 16-bit weights and their masters is trained where those are tested
NAMES = [name for name, row in OPTIMIZERS.items() if row.master == "0"]
NUM_STEPS = 120
RATE = 1e-3
# rates for rules whose steps are of another size than AdamW's
RATES = {
    "lion": 3e-4,
    "lion_8bit": 3e-4,
    "adalomo": 1e-2,
    "came": 5e-4,
    "galore_adamw": 4e-3,
    "apollo_adamw": 4e-3,
    "muon": 3e-3,
}
OPTIONS = {"galore_adamw": {"rank": 16, "update_proj_gap": 40}, "apollo_adamw": {"rank": 16}}
# how far the loss of the last eight steps may be from that of AdamW, which falls from 4.32 to 2.85; seen: 7e-4, 7e-4,
# 0, 0.054, 0.017, 0.015
FOLLOWS = {
    "adamw_8bit": 5e-3,
    "paged_adamw_8bit": 5e-3,
    "paged_adamw_32bit": 1e-4,
    "adamw_4bit": 0.1,
    "adamw_fp8": 0.03,
    "adam_mini": 0.03,
}


def train(name: str) -> list[float]:
    """Return the losses of a cosine schedule over eight batches of random tokens, to be learned by heart."""
    torch.manual_seed(0)
    batches, model = Tokens(num_rows=64).ids.split(8), TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES.get(name, RATE))
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / (2 * NUM_STEPS)))
    if name in OPTIMIZERS:
        row, options = OPTIMIZERS[name], OPTIONS.get(name, {})
        ([optimizer], [schedule]), _ = swap_optimizers(
            ([optimizer], [schedule]), model, row, options=options, keep_32bit="auto"
        )
    losses = []
    for step in range(NUM_STEPS):
        ids = batches[step % len(batches)]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@functools.lru_cache
def reference() -> tuple[float, float]:
    losses = train("adamw")
    return sum(losses[:8]) / 8, sum(losses[-8:]) / 8


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_as_its_rule_should(name) -> None:
    first, last = reference()
    found = sum(train(name)[-8:]) / 8
    if name in FOLLOWS:
        assert abs(found - last) <= FOLLOWS[name]
    # of the way of AdamW; the least seen: 0.58, of Lion
    assert found < first - 0.5 * (first - last)
