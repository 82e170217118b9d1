"""``SavedActivationPrecision`` in a Trainer."""

from __future__ import annotations

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer

from lightning_memsave import ActivationCheckpointing, SavedActivationPrecision, apply
from lightning_memsave.errors import ConfigurationError, IncompatibleMethodsError
from lightning_memsave.transforms.saved_precision import saved_counts


def train(callbacks, **options):
    module = LitLM(dropout=0.1)
    torch.manual_seed(1)
    make_trainer(callbacks=callbacks, max_epochs=4, **options).fit(module, make_loader(num_tokens=33))
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_run_follows_the_plain_one(dtype, precision, caplog):
    plain, module = train([], precision=precision), train([SavedActivationPrecision(dtype=dtype)], precision=precision)
    assert module.losses[0] == plain.losses[0], "the forward is untouched"
    # 12 steps: 0.0039 in fp32 and 0.0078 (one bf16 step of a loss of 4) elsewhere are the worst seen
    assert max(abs(a - b) for a, b in zip(module.losses, plain.losses)) < 0.05
    assert f"keep what 2 Block save for backward in {dtype}" in caplog.text
    assert "saved tensors, " in caplog.text
    assert saved_counts(module).tensors == 0
    assert list(module.state_dict()) == list(plain.state_dict())


def test_blocks_that_save_little_are_said():
    with pytest.warns(UserWarning, match="inactive: no large tensor was saved"):
        make_trainer(callbacks=[SavedActivationPrecision(min_values=10**6)]).fit(LitLM(), make_loader())


def test_recomputed_blocks_are_refused():
    with pytest.raises(IncompatibleMethodsError, match="recomputed blocks keep little but their inputs"):
        train([SavedActivationPrecision(), ActivationCheckpointing()])


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r'dtype=\'int4\' is not a form.*"int8" or "fp8"'):
        SavedActivationPrecision(dtype="int4")
    with pytest.raises(ConfigurationError, match="min_values=0 must be an int of 1 or more"):
        SavedActivationPrecision(min_values=0)


def test_it_works_without_a_trainer():
    module = LitLM()
    ids = torch.ones(16, 33, dtype=torch.int64)
    applied = apply(module, [SavedActivationPrecision()])
    module.net(ids).sum().backward()
    assert saved_counts(module).tensors > 0
    applied.undo()
    assert saved_counts(module).tensors == 0
