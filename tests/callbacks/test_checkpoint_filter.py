"""The checkpoint filter on modules with frozen parts and no adapters: what is kept, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version
from torch import nn

from lightning_memsave import AdapterCheckpoint, CheckpointMismatchError, IncompatibleMethodsError
from lightning_memsave.errors import NothingToTransformError

# A Trainer that only evaluates has no ModelCheckpoint to give its saved state to; a resumed one writes elsewhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
]


class PartlyFrozen(LitLM):
    """The last block and a BatchNorm train; everything else is frozen."""

    trained = ("net.blocks.1", "statistics")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistics = nn.BatchNorm1d(4)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(self.trained))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.statistics(batch[:, :4].float())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        }


def fit(module: Any, folder: str, *, epochs: int = 1, ckpt_path: str | None = None, weights_only: bool = False) -> Any:
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_weights_only=weights_only)
    trainer = make_trainer(callbacks=[AdapterCheckpoint(), saver], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


def load(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_trained_parameters_and_buffers_and_plain_data(weights_only: bool) -> None:
    fit(PartlyFrozen(), "c", weights_only=weights_only)
    checkpoint = load("c/epoch=0.ckpt")
    kept = set(checkpoint["state_dict"])
    assert {k for k in kept if "running" in k or "num_batches" in k} == {
        f"statistics.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert all(key.startswith(PartlyFrozen.trained) for key in kept)
    record = checkpoint["memsave"]
    assert record["format"] == 1
    assert record["trainable"]["net.blocks.1.up.weight"] == [256, 64]
    assert record["base"]["net.blocks.0.up.weight"]["shape"] == [256, 64]
    assert ("optimizer_states" in checkpoint) is not weights_only


def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one() -> None:
    whole = PartlyFrozen()
    fit(whole, "a", epochs=3)
    fit(PartlyFrozen(), "b", epochs=1)
    resumed = PartlyFrozen()
    trainer = fit(resumed, "b", epochs=3, ckpt_path="b/epoch=0.ckpt")
    assert_equal(whole, resumed)
    assert whole.losses[3:] == resumed.losses
    before, after = load("a/epoch=2.ckpt"), load("b/epoch=2.ckpt")
    assert before["lr_schedulers"] == after["lr_schedulers"]
    for key, value in before["optimizer_states"][0]["state"][0].items():
        assert torch.equal(value, after["optimizer_states"][0]["state"][0][key])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 * 0.5**3


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_load_a_filtered_checkpoint(verb: str, weights_only: bool) -> None:
    trained = PartlyFrozen()
    fit(trained, "c", weights_only=weights_only)
    fresh = PartlyFrozen()
    getattr(make_trainer(callbacks=[AdapterCheckpoint()]), verb)(fresh, make_loader(), ckpt_path="c/epoch=0.ckpt")
    assert_equal(trained, fresh)


def test_best_is_found_by_the_same_trainer() -> None:
    trained = PartlyFrozen()
    trainer = fit(trained, "c")
    fresh = PartlyFrozen()
    trainer.test(fresh, make_loader(), ckpt_path="best", verbose=False)
    assert_equal(trained, fresh)


def test_save_checkpoint_after_fit_writes_the_same_kind_of_file() -> None:
    trainer = fit(PartlyFrozen(), "c")
    trainer.save_checkpoint("after.ckpt")
    after, during = load("after.ckpt"), load("c/epoch=0.ckpt")
    assert set(after["state_dict"]) == set(during["state_dict"])
    assert after["memsave"] == during["memsave"]


def test_a_plain_lightning_checkpoint_still_loads() -> None:
    plain = PartlyFrozen()
    make_trainer(max_epochs=1).fit(plain, make_loader())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(plain, make_loader())
    trainer.save_checkpoint("plain.ckpt")
    assert "net.embedding.weight" in load("plain.ckpt")["state_dict"]
    resumed = PartlyFrozen()
    fit(resumed, "c", epochs=2, ckpt_path="plain.ckpt")
    assert set(load("c/epoch=1.ckpt")["state_dict"]) <= set(resumed.state_dict())
    assert "net.embedding.weight" not in load("c/epoch=1.ckpt")["state_dict"]


def test_a_plain_checkpoint_of_another_base_stays_in_later_checkpoints() -> None:
    other = PartlyFrozen()
    with torch.no_grad():
        other.net.embedding.weight.add_(1)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(other, make_loader())
    trainer.save_checkpoint("plain.ckpt")
    fit(PartlyFrozen(), "c", epochs=2, ckpt_path="plain.ckpt")
    saved = load("c/epoch=1.ckpt")
    assert torch.equal(saved["state_dict"]["net.embedding.weight"], other.net.embedding.weight)
    assert saved["memsave"]["moved"] == ["net.embedding.weight"]


def test_tied_parameters_load_under_every_name() -> None:
    class Tied(PartlyFrozen):
        trained = ("net.embedding", "net.head")

    fit(Tied(tied=True), "c")
    saved = load("c/epoch=0.ckpt")["state_dict"]
    assert {"net.embedding.weight", "net.head.weight"} <= set(saved)
    fresh = Tied(tied=True)
    fit(fresh, "c", epochs=2, ckpt_path="c/epoch=0.ckpt")
    assert fresh.net.head.weight is fresh.net.embedding.weight


def test_frozen_tied_parameters_are_left_out_under_every_name() -> None:
    fit(PartlyFrozen(tied=True), "c")
    checkpoint = load("c/epoch=0.ckpt")
    assert not {"net.embedding.weight", "net.head.weight"} & set(checkpoint["state_dict"])
    assert checkpoint["memsave"]["base"]["net.head.weight"] == checkpoint["memsave"]["base"]["net.embedding.weight"]


class Unfreezing(PartlyFrozen):
    """Unfreezes its first block in the second epoch; its optimizer knows all parameters from the start."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 1:
            self.net.blocks[0].requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_part_unfrozen_in_training_is_saved_from_then_on_and_restored() -> None:
    whole = Unfreezing()
    fit(whole, "c", epochs=3)
    assert "net.blocks.0.up.weight" not in load("c/epoch=0.ckpt")["state_dict"]
    assert "net.blocks.0.up.weight" in load("c/epoch=1.ckpt")["state_dict"]
    resumed = Unfreezing()
    assert not resumed.net.blocks[0].up.weight.requires_grad
    fit(resumed, "d", epochs=3, ckpt_path="c/epoch=1.ckpt")
    assert_equal(whole, resumed)


def test_a_checkpoint_from_before_the_unfreezing_loads_into_the_unfrozen_module() -> None:
    fit(Unfreezing(), "c", epochs=1)
    later = Unfreezing()
    later.net.blocks[0].requires_grad_(True)
    make_trainer(callbacks=[AdapterCheckpoint()]).validate(later, make_loader(), ckpt_path="c/epoch=0.ckpt")
    other = Unfreezing()
    other.net.blocks[0].requires_grad_(True)
    with torch.no_grad():
        other.net.blocks[0].up.weight.add_(1)
    with pytest.raises(CheckpointMismatchError, match=r"lacks 1 tensor \(first: net.blocks.0.up.weight\)"):
        make_trainer(callbacks=[AdapterCheckpoint()]).validate(other, make_loader(), ckpt_path="c/epoch=0.ckpt")


class Teacher(PartlyFrozen):
    """A frozen copy of the head that follows it by momentum, through ``.data`` as many projects do."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = nn.Linear(64, 4).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.9).add_(0.01)


def test_a_frozen_weight_that_moves_is_saved_and_restored() -> None:
    torch.manual_seed(0)
    whole = Teacher()
    fit(whole, "c", epochs=2)
    first = load("c/epoch=0.ckpt")
    assert first["memsave"]["moved"] == ["teacher.bias", "teacher.weight"]
    torch.manual_seed(0)
    resumed = Teacher()
    fit(resumed, "d", epochs=2, ckpt_path="c/epoch=0.ckpt")
    assert_equal(whole, resumed)
    assert load("d/epoch=1.ckpt")["memsave"]["moved"] == ["teacher.bias", "teacher.weight"]


# -- refusals -----------------------------------------------------------------------------------------------------
def _edited(edit: Any, source: str = "c/epoch=0.ckpt") -> str:
    checkpoint = load(source)
    edit(checkpoint)
    torch.save(checkpoint, "edited.ckpt")
    return "edited.ckpt"


def _refused(path: str, module: Any = None) -> str:
    module = module or PartlyFrozen()
    before = states(module)
    with pytest.raises(CheckpointMismatchError) as caught:
        fit(module, "d", epochs=2, ckpt_path=path)
    for key, value in before.items():
        assert torch.equal(value, module.state_dict()[key]), f"{key} was touched"
    return str(caught.value)


def test_a_missing_key_is_refused_before_a_weight_is_touched() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["state_dict"].pop("net.blocks.1.up.weight"))
    assert "it lacks 1 tensor (first: net.blocks.1.up.weight) that the module needs" in _refused(path)


def test_a_missing_buffer_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["state_dict"].pop("statistics.running_mean"))
    assert "first: statistics.running_mean" in _refused(path)


def test_an_unknown_key_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["state_dict"].update(extra=torch.zeros(1)))
    assert "it holds 1 tensor (first: extra) that the module does not have" in _refused(path)


def test_renamed_keys_are_refused_and_the_message_says_so() -> None:
    fit(PartlyFrozen(), "c")

    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k.replace("blocks", "layers"): v for k, v in checkpoint["state_dict"].items()}

    message = _refused(_edited(rename))
    assert "it lacks 12 tensors" in message
    assert "first: net.layers.1.down.bias" in message
    assert "were parts of the module renamed" in message


def test_a_reshaped_key_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["state_dict"].update({"net.blocks.1.up.bias": torch.zeros(3)}))
    assert "1 tensor (first: net.blocks.1.up.bias) of other shape ([3] there, [256] here)" in _refused(path)


def test_another_base_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    other = PartlyFrozen()
    with torch.no_grad():
        other.net.embedding.weight[0, 0] += 1
    message = _refused("c/epoch=0.ckpt", other)
    assert "it was saved on another base: 1 frozen weight (first: net.embedding.weight) of other content" in message
    assert "same pretrained weights" in message


def test_a_base_of_another_shape_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    message = _refused("c/epoch=0.ckpt", PartlyFrozen(vocabulary=65))
    assert (
        "2 frozen weights (first: net.embedding.weight, net.head.weight) of other shape ([64, 64] there, [65, 64] here)"
        in message
    )


def test_a_deeper_or_shallower_base_is_refused() -> None:
    class Shallow(PartlyFrozen):
        trained = ("net.norm",)

    fit(Shallow(depth=1), "c")
    assert "which lacks 12 frozen weights" in _refused("c/epoch=0.ckpt", Shallow(depth=2))
    fit(Shallow(depth=2), "e")
    assert "12 frozen weights (first: net.blocks.1.down.bias, " in _refused("e/epoch=0.ckpt", Shallow(depth=1))


def test_a_newer_format_is_refused() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["memsave"].update(format=2))
    assert "has format 2, and this version of lightning_memsave reads up to 1" in _refused(path)


def test_a_plain_checkpoint_that_lacks_a_frozen_weight_is_refused() -> None:
    trainer = make_trainer()
    trainer.fit(PartlyFrozen(), make_loader())
    trainer.save_checkpoint("plain.ckpt")
    path = _edited(lambda c: c["state_dict"].pop("net.embedding.weight"), "plain.ckpt")
    assert "it lacks 1 tensor (first: net.embedding.weight)" in _refused(path)


def test_strict_loading_switched_off_by_the_user_warns_instead() -> None:
    fit(PartlyFrozen(), "c")
    path = _edited(lambda c: c["state_dict"].pop("net.blocks.1.up.weight"))
    module = PartlyFrozen()
    module.strict_loading = False
    with pytest.warns(UserWarning, match=r"strict_loading=False, so what fits is loaded.*\n.*net.blocks.1.up.weight"):
        fit(module, "d", epochs=1, ckpt_path=path)


def test_nothing_frozen_is_refused() -> None:
    trainer = make_trainer(callbacks=[AdapterCheckpoint()])
    with pytest.raises(NothingToTransformError, match="all parameters of LitLM are trainable"):
        trainer.fit(LitLM(), make_loader())


@pytest.mark.skipif(Version(pl.__version__) < Version("2.6"), reason="Lightning has WeightAveraging from 2.6 on")
def test_weight_averaging_is_refused() -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    trainer = make_trainer(callbacks=[AdapterCheckpoint(), WeightAveraging()])
    with pytest.raises(IncompatibleMethodsError, match="AdapterCheckpoint and WeightAveraging do not combine"):
        trainer.fit(PartlyFrozen(), make_loader())


# -- optimizer states ---------------------------------------------------------------------------------------------
class Grouped(PartlyFrozen):
    """Two groups with their own rates, in an order that can be turned around."""

    turned = False
    params_turned = False

    def configure_optimizers(self) -> Any:
        block = list(self.net.blocks[1].parameters())
        norm = [*self.statistics.parameters()]
        if self.params_turned:
            block.reverse()
        groups = [{"params": block, "lr": 1e-3}, {"params": norm, "lr": 1e-2}]
        return torch.optim.AdamW(groups[::-1] if self.turned else groups)


@pytest.mark.parametrize("change", [{"turned": True}, {"params_turned": True}, {"turned": True, "params_turned": True}])
def test_optimizer_states_are_restored_by_name(change: dict[str, bool]) -> None:
    whole = Grouped()
    fit(whole, "a", epochs=2)
    fit(Grouped(), "c", epochs=1)
    resumed = Grouped()
    for name, value in change.items():
        setattr(resumed, name, value)
    fit(resumed, "d", epochs=2, ckpt_path="c/epoch=0.ckpt")
    assert_equal(whole, resumed)


def test_another_set_of_trained_parameters_is_refused_by_name() -> None:
    fit(Grouped(), "c", epochs=1)

    class Fewer(Grouped):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.blocks[1].parameters())

    with pytest.raises(CheckpointMismatchError, match=r"saved for 14 .* now has 12: 2 that are not optimized any more"):
        fit(Fewer(), "d", epochs=2, ckpt_path="c/epoch=0.ckpt")


def test_other_groups_of_the_same_parameters_are_refused() -> None:
    fit(Grouped(), "c", epochs=1)

    class OneGroup(Grouped):
        two_groups = Grouped.configure_optimizers

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(p for g in self.two_groups().param_groups for p in g["params"])

    with pytest.raises(
        CheckpointMismatchError, match=r"groups of \[12, 2\] parameters and is loaded into groups of \[14\]"
    ):
        fit(OneGroup(), "d", epochs=2, ckpt_path="c/epoch=0.ckpt")


def test_turned_groups_with_a_scheduler_are_refused() -> None:
    class Scheduled(Grouped):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    fit(Scheduled(), "c", epochs=1)
    turned = Scheduled()
    turned.turned = True
    with pytest.raises(CheckpointMismatchError, match="divide or order them in another way"):
        fit(turned, "d", epochs=2, ckpt_path="c/epoch=0.ckpt")
