"""ActivationCheckpointing in a Trainer: equal training under every precision, resume, undo, messages."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_memsave import ActivationCheckpointing, ConfigurationError, NothingToTransformError, apply
from lightning_memsave.transforms.checkpoint_blocks import recompute_counts


def fit(module: Any, *callbacks: Any, **trainer: Any) -> Any:
    torch.manual_seed(1)
    made = make_trainer(callbacks=list(callbacks), **trainer)
    made.fit(module, make_loader())
    return made


@pytest.mark.parametrize("policy", ["full", "selective", "every_n"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_is_bitwise_equal_in_every_precision(policy, precision):
    plain, module = LitLM(dropout=0.1), LitLM(dropout=0.1)
    fit(plain, precision=precision, gradient_clip_val=0.5)
    fit(module, ActivationCheckpointing(policy=policy), precision=precision, gradient_clip_val=0.5)
    assert module.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters()))


@pytest.mark.parametrize("place", ["init", "setup", "configure_model"])
def test_blocks_are_found_wherever_the_model_is_built_and_left_plain_after_the_fit(place):
    seen: dict[str, Any] = {}

    class Watch(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            seen.update(recompute_counts(module))

    module = LitLM(build_in=place)
    fit(module, ActivationCheckpointing(), Watch())
    assert {name: count.recomputed for name, count in seen.items()} == {"net.blocks.0": 3, "net.blocks.1": 3}
    assert recompute_counts(module) == {}
    assert not any("forward" in m.__dict__ for m in module.modules())


class SeededByStep(LitLM):
    """Draws the same dropout masks in a step, whatever a Trainer drew before it (that depends on its version)."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.global_step)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, half, resumed = (SeededByStep(dropout=0.1) for _ in range(3))
    fit(whole, ActivationCheckpointing(), max_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(callbacks=[ActivationCheckpointing(), checkpoint], enable_checkpointing=True).fit(half, make_loader())
    savers = [ActivationCheckpointing(policy="selective"), ModelCheckpoint(tmp_path, save_last=True)]
    trainer = make_trainer(callbacks=savers, max_epochs=2, enable_checkpointing=True)
    trainer.fit(resumed, make_loader(), ckpt_path=checkpoint.last_model_path)
    assert half.losses + resumed.losses == whole.losses
    plain = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert plain.keys() == LitLM().state_dict().keys()


def test_two_of_them_may_recompute_different_blocks_in_different_ways():
    plain, module = LitLM(depth=4), LitLM(depth=4)
    fit(plain)
    first = ActivationCheckpointing("net.blocks.[01]")
    second = ActivationCheckpointing("net.blocks.[23]", policy="selective")
    fit(module, second, first)
    assert module.losses == plain.losses


def test_two_over_one_block_are_refused_before_training():
    with pytest.raises(
        ConfigurationError, match=r"'net.blocks.1' is selected, and 'net.blocks.1' is recomputed already"
    ):
        fit(LitLM(), ActivationCheckpointing(), ActivationCheckpointing("net.blocks.1"))


def test_the_same_one_twice_is_one():
    plain, module = LitLM(), LitLM()
    fit(plain)
    fit(module, ActivationCheckpointing(), ActivationCheckpointing())
    assert module.losses == plain.losses


def test_a_pattern_that_matches_nothing_is_refused_with_the_near_names():
    module = LitLM()
    with pytest.raises(NothingToTransformError, match=r"modules='net.block.\*' matched none.*'net.blocks"):
        fit(module, ActivationCheckpointing("net.block.*"))
    assert module.losses == []


def test_silent_dropout_of_an_eval_mode_block_is_said():
    class Loaded(LitLM):
        def _build(self) -> None:
            super()._build()
            self.net.blocks.append(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)))
            self.net.eval()

    module = Loaded()
    with pytest.warns(UserWarning, match=r"1 of 3 recomputed blocks are in eval mode.*Call .train\(\)"):
        fit(module, ActivationCheckpointing("net.blocks.*[0-9]"))
    with pytest.warns(UserWarning, match="1 of 3 recomputed"):
        fit(module, ActivationCheckpointing(["Block", "net.blocks.2"]))


def test_the_block_whose_recompute_fails_is_named():
    class Unsteady(nn.Module):
        calls = [0]

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            cut = 4 if self.calls[0] == 1 else 2
            return x + torch.tanh(self.linear(x[:cut])).mean()

    class Lit(LitLM):
        def _build(self) -> None:
            super()._build()
            self.net.blocks[1] = Unsteady()

    with pytest.raises(ConfigurationError, match=r"recomputing 'net.blocks.1' in backward failed(?s:.)*Leave 'net.bl"):
        fit(Lit(), ActivationCheckpointing(["net.blocks.0", "net.blocks.1"]))


def test_manual_optimization_is_equal_too():
    class Manual(LitLM):
        def __init__(self) -> None:
            super().__init__(dropout=0.1)
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                loss = self.loss(batch)
                self.losses.append(loss.item())
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    plain, module = Manual(), Manual()
    fit(plain, precision="bf16-mixed")
    fit(module, ActivationCheckpointing(), precision="bf16-mixed")
    assert module.losses == plain.losses


def test_apply_works_without_a_trainer_and_takes_back():
    module = LitLM()
    applied = apply(module, [ActivationCheckpointing()])
    module.loss(torch.randint(0, 64, (2, 8))).backward()
    assert all(count.recomputed == 1 for count in recompute_counts(module).values())
    applied.undo()
    assert recompute_counts(module) == {}


def test_the_callback_is_configuration_only():
    callback = ActivationCheckpointing(["a", "b.*"], policy="every_n", every_n=4)
    shown = "ActivationCheckpointing(modules=['a', 'b.*'], policy='every_n', every_n=4)"
    assert repr(callback) == repr(copy.deepcopy(callback)) == repr(pickle.loads(pickle.dumps(callback))) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "budget"}, r'does not exist yet. Use one of "full", "selective", "every_n", without budget'),
        ({"budget": "8GiB"}, "does not exist yet"),
        ({"policy": "some"}, r"policy='some' is not a policy. Use one of \"full\""),
        ({"every_n": 1, "policy": "every_n"}, r'every_n=1 must be an int of 2 or more; policy="full"'),
        ({"every_n": True}, "every_n=True must be an int"),
        ({"every_n": 3}, r'every_n=3 has no effect with policy=.full.. Add policy="every_n"'),
        ({"modules": []}, r"modules=\[\] selects nothing"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ActivationCheckpointing(**arguments)


def test_all_wrong_arguments_are_listed_at_once():
    with pytest.raises(ConfigurationError) as caught:
        ActivationCheckpointing(policy="none", every_n=0)
    assert str(caught.value).count("\n  - ") == 2
