"""Checkpoints of runs with LoRA and QLoRA: size, resume, refusals, PEFT folders."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_memsave import (
    AdapterCheckpoint,
    CheckpointMismatchError,
    ConfigurationError,
    LoRA,
    LowMemoryOptimizer,
    QLoRA,
    apply,
    load_adapters,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
]
BLOCKS = ["*.q_proj", "*.up"]


def fit(
    module: Any, savers: list[Any], folder: str, *, epochs: int = 1, ckpt_path: str | None = None, **kw: Any
) -> Any:
    weights_only = kw.pop("save_weights_only", False)
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_weights_only=weights_only)
    trainer = make_trainer(callbacks=[*savers, saver], max_epochs=epochs, enable_checkpointing=True, **kw)
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


def load(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert set(first) == set(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


class Scheduled(LitLM):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        }


SAVERS = {
    "lora": lambda: [LoRA(rank=4, modules=BLOCKS)],
    "dora": lambda: [LoRA(rank=4, modules=BLOCKS, variant="dora")],
    "qlora": lambda: [QLoRA(rank=4, modules=BLOCKS)],
    "qlora_int8": lambda: [QLoRA(rank=4, modules=BLOCKS, kind="int8")],
    "lora_8bit_optimizer": lambda: [LoRA(rank=16, modules=BLOCKS), LowMemoryOptimizer("adamw_8bit")],
    "qlora_bf16_base": lambda: [QLoRA(rank=4, modules=BLOCKS, frozen_dtype="bf16")],
}


@pytest.mark.parametrize("method", SAVERS)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(method: str) -> None:
    whole, resumed = Scheduled(), Scheduled()
    fit(whole, SAVERS[method](), "a", epochs=3)
    fit(Scheduled(), SAVERS[method](), "b", epochs=1)
    fit(resumed, SAVERS[method](), "b", epochs=3, ckpt_path="b/epoch=0.ckpt")
    assert_equal(whole, resumed)
    assert whole.losses[3:] == resumed.losses
    a, b = load("a/epoch=2.ckpt"), load("b/epoch=2.ckpt")
    assert a["lr_schedulers"] == b["lr_schedulers"]
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["memsave"] == b["memsave"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_resume_is_bitwise_equal_in_lower_precision(method: str, precision: str) -> None:
    whole, resumed = Scheduled(), Scheduled()
    fit(whole, SAVERS[method](), "a", epochs=2, precision=precision)
    fit(Scheduled(), SAVERS[method](), "b", epochs=1, precision=precision)
    fit(resumed, SAVERS[method](), "b", epochs=2, ckpt_path="b/epoch=0.ckpt", precision=precision)
    assert_equal(whole, resumed)


def test_the_base_is_compared_under_true_bf16_too() -> None:
    fit(LitLM(), SAVERS["lora"](), "a", precision="bf16-true")
    other = LitLM()
    with torch.no_grad():
        other.net.embedding.weight.mul_(1.5)
    with pytest.raises(CheckpointMismatchError, match=r"net.embedding.weight.* of other content"):
        fit(other, SAVERS["lora"](), "b", epochs=2, ckpt_path="a/epoch=0.ckpt", precision="bf16-true")


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora", "qlora_int8"])
def test_a_checkpoint_holds_the_adapters_only(method: str, weights_only: bool) -> None:
    fit(LitLM(), SAVERS[method](), "a", save_weights_only=weights_only)
    checkpoint = load("a/epoch=0.ckpt")
    assert len(checkpoint["state_dict"]) == 8
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    # 2 blocks: q_proj rank * (64 + 64), up rank * (64 + 256), fp32
    assert sum(t.nbytes for t in checkpoint["state_dict"].values()) == 2 * 4 * (128 + 320) * 4
    config = checkpoint["memsave"]["adapters"]["net"]
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == [f"blocks.{i}.{name}" for i in range(2) for name in ("q_proj", "up")]


def test_the_file_shrinks_by_the_bytes_of_the_base() -> None:
    adapters = fit(LitLM(width=128), [QLoRA(rank=4, modules=BLOCKS)], "a")
    plain = make_trainer()
    plain.fit(LitLM(width=128), make_loader())
    plain.save_checkpoint("plain.ckpt")
    small, full = Path("a/epoch=0.ckpt").stat().st_size, Path("plain.ckpt").stat().st_size
    frozen = sum(p.numel() * 4 for p in LitLM(width=128).parameters())
    assert adapters.lightning_module is not None
    assert full - small > 2.9 * frozen  # the weights and their two Adam moments
    record = len(pickle.dumps(load("a/epoch=0.ckpt")["memsave"]))
    assert record < 300 * 40  # bytes per parameter of the base


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_other_verbs_load_it_into_a_fresh_module(verb: str, method: str) -> None:
    trained = LitLM()
    fit(trained, SAVERS[method](), "a")
    fresh = LitLM()
    getattr(make_trainer(callbacks=SAVERS[method]()), verb)(fresh, make_loader(), ckpt_path="a/epoch=0.ckpt")
    assert_equal(trained, fresh)


def test_a_second_fit_on_the_same_module_saves_the_same_kind_of_file() -> None:
    module = LitLM()
    fit(module, SAVERS["lora"](), "a")
    fit(module, SAVERS["lora"](), "b")
    assert set(load("a/epoch=0.ckpt")["state_dict"]) == set(load("b/epoch=0.ckpt")["state_dict"])


@pytest.mark.filterwarnings("ignore:.*was called without a model.*", "ignore:.*no last checkpoint available.*")
def test_on_exception_checkpoints_are_filtered_too() -> None:
    class Failing(LitLM):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("out of luck")

    saver = pl.callbacks.OnExceptionCheckpoint("a")
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(callbacks=[*SAVERS["qlora"](), saver], max_epochs=1, enable_checkpointing=True).fit(
            Failing(), make_loader()
        )
    assert all(".lora_" in key for key in load(saver.ckpt_path)["state_dict"])


def test_the_learning_rate_finder_restores_what_it_saved() -> None:
    found = pl.callbacks.LearningRateFinder(num_training_steps=3)
    module = LitLM()
    make_trainer(callbacks=[*SAVERS["qlora"](), found]).fit(module, make_loader())
    assert found.optimal_lr is not None


@pytest.mark.parametrize("compiled_first", [True, False])
def test_names_do_not_depend_on_compile(compiled_first: bool) -> None:
    class Compiled(LitLM):
        compiled = True

        def configure_model(self) -> None:
            if self.compiled and not hasattr(self.net.blocks[0], "_orig_mod"):
                self.net.blocks[0] = torch.compile(self.net.blocks[0], backend="eager")

    class Plain(Compiled):
        compiled = False

    first, second = (Compiled, Plain) if compiled_first else (Plain, Compiled)
    trained, fresh = first(), second()
    fit(trained, SAVERS["lora"](), "a")
    assert not any("_orig_mod" in key for key in load("a/epoch=0.ckpt")["state_dict"])
    make_trainer(callbacks=SAVERS["lora"]()).validate(fresh, make_loader(), ckpt_path="a/epoch=0.ckpt", verbose=False)
    first_state = {key.replace("._orig_mod", ""): value for key, value in trained.state_dict().items()}
    second_state = {key.replace("._orig_mod", ""): value for key, value in fresh.state_dict().items()}
    torch.testing.assert_close(first_state, second_state, rtol=0, atol=0)


def test_the_users_own_callback_takes_the_place_of_the_attached_one() -> None:
    for order in (lambda s: s, lambda s: s[::-1]):
        trainer = fit(LitLM(), order([*SAVERS["lora"](), AdapterCheckpoint(export_peft=True)]), "a")
        assert trainer.strategy._memsave_checkpoint.export_peft


def test_callbacks_are_copied_and_pickled() -> None:
    callback = AdapterCheckpoint(export_peft=True)
    assert pickle.loads(pickle.dumps(copy.deepcopy(callback))).export_peft is True


def test_a_wrong_option_is_refused_at_construction() -> None:
    with pytest.raises(ConfigurationError, match="export_peft='yes' is no bool"):
        AdapterCheckpoint(export_peft="yes")  # type: ignore[arg-type]


# -- refusals -----------------------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint() -> str:
    fit(LitLM(), [LoRA(rank=16, alpha=16, modules=BLOCKS)], "saved")
    return "saved/epoch=0.ckpt"


def refused(savers: list[Any], path: str, module: Any = None) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        fit(module or LitLM(), savers, "d", epochs=2, ckpt_path=path)
    return str(caught.value)


def test_another_rank_is_refused(checkpoint: str) -> None:
    message = refused([LoRA(rank=8, alpha=16, modules=BLOCKS)], checkpoint)
    assert "it was saved with rank 16, and the module has rank 8. Write rank=16." in message


def test_another_scale_is_refused(checkpoint: str) -> None:
    message = refused([LoRA(rank=16, alpha=32, modules=BLOCKS)], checkpoint)
    assert "its adapters were trained with lora_alpha=16, and the module's have lora_alpha=32" in message
    message = refused([LoRA(rank=16, alpha=16, modules=BLOCKS, variant="rslora")], checkpoint)
    assert "use_rslora=False, and the module's have use_rslora=True" in message


def test_adapters_on_other_layers_are_refused(checkpoint: str) -> None:
    message = refused([LoRA(rank=16, alpha=16, modules=["*.q_proj", "*.down"])], checkpoint)
    assert "it lacks 4 tensors (first: net.blocks.0.down.lora_A.default.weight" in message
    assert "it holds 4 tensors (first: net.blocks.0.up.lora_A.default.weight" in message


def test_a_module_without_adapters_is_refused(checkpoint: str) -> None:
    module = LitLM()
    module.net.embedding.requires_grad_(False)
    message = refused([AdapterCheckpoint()], checkpoint, module)
    assert "it holds adapters (8 tensors (first: " in message
    assert "Add LoRA or QLoRA with the settings of the run that saved it" in message


def test_another_base_is_refused(checkpoint: str) -> None:
    other = LitLM()
    with torch.no_grad():
        other.net.blocks[0].up.weight[3, 4] += 1e-3
    message = refused([LoRA(rank=16, alpha=16, modules=BLOCKS)], checkpoint, other)
    assert "it was saved on another base: 1 frozen weight (first: net.blocks.0.up.weight) of other content" in message


def test_a_base_quantized_now_is_taken_and_said(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(callbacks=[QLoRA(rank=16, alpha=16, modules=BLOCKS)]).validate(
        LitLM(), make_loader(), ckpt_path=checkpoint, verbose=False
    )
    assert "stored as float32 (cpu) there, as nf4-64-double (cpu) here: only their shapes were compared" in caplog.text


@pytest.fixture
def plain() -> tuple[str, LitLM]:
    """A checkpoint of a run without adapters."""
    module, trainer = LitLM(), make_trainer()
    trainer.fit(module, make_loader())
    trainer.save_checkpoint("plain.ckpt")
    return "plain.ckpt", module


def test_a_model_trained_without_adapters_loads_below_them(plain: tuple[str, LitLM]) -> None:
    path, before = plain
    module = LitLM()
    make_trainer(callbacks=SAVERS["lora"]()).validate(module, make_loader(), ckpt_path=path, verbose=False)
    assert torch.equal(module.net.blocks[0].up.base_layer.weight, before.net.blocks[0].up.weight)
    assert torch.equal(module.net.embedding.weight, before.net.embedding.weight)


def test_training_does_not_go_on_from_a_checkpoint_without_adapters(plain: tuple[str, LitLM]) -> None:
    message = refused(SAVERS["lora"](), plain[0])
    assert "load it first (load_from_checkpoint), then pass the module to fit" in message


def test_a_model_loaded_first_gets_its_adapters_then(plain: tuple[str, LitLM]) -> None:
    path, before = plain
    module = LitLM.load_from_checkpoint(path)
    fit(module, SAVERS["qlora"](), "a")
    assert torch.equal(module.net.embedding.weight, before.net.embedding.weight)


def test_a_plain_checkpoint_does_not_load_into_quantized_weights(plain: tuple[str, LitLM]) -> None:
    with pytest.raises(CheckpointMismatchError, match="a plain checkpoint loads before quantization only"):
        make_trainer(callbacks=SAVERS["qlora"]()).validate(LitLM(), make_loader(), ckpt_path=plain[0], verbose=False)


def test_a_whole_checkpoint_of_a_quantized_module_loads_where_the_codes_are_equal() -> None:
    trained = LitLM()
    fit(trained, SAVERS["qlora"](), "a")
    whole = {**load("a/epoch=0.ckpt"), "state_dict": trained.state_dict()}
    del whole["memsave"]
    torch.save(whole, "whole.ckpt")
    resumed = LitLM()
    make_trainer(callbacks=SAVERS["qlora"]()).validate(resumed, make_loader(), ckpt_path="whole.ckpt", verbose=False)
    assert_equal(trained, resumed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spawned_training_without_checkpoints_is_refused() -> None:
    from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

    trainer = make_trainer(strategy="ddp_spawn", devices=2)
    trainer.state.fn = pl.trainer.states.TrainerFn.FITTING
    with pytest.raises(ConfigurationError, match=r"QLoRA: .* no checkpoint is written, so what was trained"):
        attach_adapter_checkpoint(trainer, LitLM(), "QLoRA")


def test_spawned_training_says_where_the_adapters_are() -> None:
    from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

    trainer = make_trainer(strategy="ddp_spawn", devices=2, enable_checkpointing=True)
    trainer.state.fn = pl.trainer.states.TrainerFn.FITTING
    with pytest.warns(UserWarning, match="Read what was trained from the checkpoint \\(load_adapters\\)"):
        attach_adapter_checkpoint(trainer, LitLM(), "QLoRA")


def test_deepspeed_is_told_to_leave_frozen_parameters_out(caplog: pytest.LogCaptureFixture) -> None:
    from lightning_memsave.callbacks._checkpoint import attach_adapter_checkpoint

    class DeepSpeedStrategy(pl.strategies.SingleDeviceStrategy):  # known by its name; the library is optional
        exclude_frozen_parameters = False

    trainer, module = make_trainer(), LitLM()
    strategy = trainer._accelerator_connector.strategy = DeepSpeedStrategy("cpu")
    attach_adapter_checkpoint(trainer, module, "QLoRA")
    assert strategy.exclude_frozen_parameters is True
    assert module.strict_loading is False
    assert "DeepSpeed leaves frozen parameters out of its checkpoints" in caplog.text


# -- PEFT folders -------------------------------------------------------------------------------------------------
class LitLlama(pl.LightningModule):
    """A Hugging Face model below the LightningModule's own prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).train()


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_peft_reads_the_exported_folder_on_the_base_model(variant: Any) -> None:
    from peft import PeftModel

    module = LitLlama()
    fit(module, [LoRA(rank=4, variant=variant), AdapterCheckpoint(export_peft=True)], "a")
    assert sorted(p.name for p in Path("a").iterdir()) == ["epoch=0-peft", "epoch=0.ckpt"]
    loaded = PeftModel.from_pretrained(llama(), "a/epoch=0-peft").eval()
    ids = torch.arange(32).view(2, 16)
    expected, plain = module.model.eval()(ids).logits, llama().eval()(ids).logits
    # worst seen 0: the same products in the same order
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-2
    config = json.loads(Path("a/epoch=0-peft/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["use_rslora"], config["use_dora"]) == (variant == "rslora", variant == "dora")


def test_a_head_trained_in_full_goes_to_the_peft_folder() -> None:
    from peft import PeftModel

    module = LitLlama()
    fit(module, [LoRA(rank=4, modules=["*.q_proj"], train="model.lm_head"), AdapterCheckpoint(export_peft=True)], "a")
    loaded = PeftModel.from_pretrained(llama(), "a/epoch=0-peft").eval()
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(loaded(ids).logits, module.model.eval()(ids).logits, rtol=0, atol=1e-6)
    fresh = LitLlama()
    apply(fresh, [LoRA(rank=4, modules=["*.q_proj"], train="model.lm_head")])
    assert load_adapters(fresh, "a/epoch=0-peft") == 5
    assert_equal(module, fresh)


def test_what_the_format_cannot_hold_is_said() -> None:
    class Outside(LitLlama):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + self.scale(torch.ones(1)).sum()

    savers = [LoRA(rank=4, modules=["*.q_proj"], train="scale"), AdapterCheckpoint(export_peft=True)]
    with pytest.warns(UserWarning, match=r"2 trained tensors have no place in PEFT's format.*scale.bias"):
        fit(Outside(), savers, "a")


def test_adapters_in_two_models_get_a_folder_each() -> None:
    class Two(LitLM):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Sequential(nn.Linear(8, 8))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + self.second(torch.ones(8)).sum()

    savers = [LoRA(rank=2, modules=["*.q_proj", "second.0"]), AdapterCheckpoint(export_peft=True)]
    trained = Two()
    fit(trained, savers, "a")
    assert sorted(p.name for p in Path("a/epoch=0-peft").iterdir()) == ["net", "second"]
    fresh = Two()
    apply(fresh, [LoRA(rank=2, modules=["*.q_proj", "second.0"])])
    assert load_adapters(fresh, "a/epoch=0-peft") == 6
    assert_equal(trained, fresh)


def test_a_peft_folder_goes_with_its_checkpoint() -> None:
    saver = ModelCheckpoint("a", filename="{epoch}", save_top_k=1)
    savers = [LoRA(rank=4), AdapterCheckpoint(export_peft=True), saver]
    make_trainer(callbacks=savers, max_epochs=3, enable_checkpointing=True).fit(LitLM(), make_loader())
    assert sorted(path.name for path in Path("a").iterdir()) == ["epoch=2-peft", "epoch=2.ckpt"]


def test_a_remote_checkpoint_says_that_no_peft_folder_is_written() -> None:
    saver = ModelCheckpoint("memory://somewhere", filename="c")
    savers = [LoRA(rank=4), AdapterCheckpoint(export_peft=True), saver]
    with pytest.warns(UserWarning, match="only local folders are supported"):
        make_trainer(callbacks=savers, enable_checkpointing=True).fit(LitLM(), make_loader())


def test_exporting_without_adapters_is_refused() -> None:
    module = LitLM()
    module.net.embedding.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"LitLM has no adapters to export\. Add LoRA or QLoRA"):
        make_trainer(callbacks=[AdapterCheckpoint(export_peft=True)]).fit(module, make_loader())


def test_the_other_namespace_saves_and_resumes() -> None:
    import pytorch_lightning as ptl  # noqa: TID251

    class Other(ptl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch[:, :8].float()).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def run(module: Any, epochs: int, path: str | None = None) -> None:
        saver = ptl.callbacks.ModelCheckpoint("a", filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(ptl, callbacks=[LoRA(rank=2), saver], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, make_loader(), ckpt_path=path)

    whole, resumed = Other(), Other()
    run(whole, 2)
    assert all(".lora_" in key for key in load("a/epoch=0.ckpt")["state_dict"])
    run(resumed, 2, "a/epoch=0.ckpt")
    assert_equal(whole, resumed)
