"""Reading adapters without a Trainer: our checkpoints, PEFT's folders, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitLM, TinyLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_memsave import (
    AdapterCheckpoint,
    CheckpointMismatchError,
    ConfigurationError,
    LoRA,
    NothingToTransformError,
    QLoRA,
    apply,
    load_adapters,
)
from lightning_memsave.transforms._adapter_files import write_peft

IDS = torch.arange(32).view(2, 16)
BLOCKS = ["*.q_proj", "*.up"]


def train(method: Any) -> LitLM:
    module = LitLM(lr=1e-2)
    savers = [method, AdapterCheckpoint(export_peft=True), ModelCheckpoint("c", filename="c")]
    make_trainer(callbacks=savers, enable_checkpointing=True).fit(module, make_loader())
    return module.eval()


def prepared(method: Any, module: nn.Module | None = None) -> Any:
    module = LitLM() if module is None else module
    apply(module, [method])
    return module.eval()


def network() -> TinyLM:
    return LitLM().net


METHODS = {
    "lora": lambda: LoRA(rank=4, modules=BLOCKS),
    "dora": lambda: LoRA(rank=4, modules=BLOCKS, variant="dora"),
    "rslora": lambda: LoRA(rank=4, modules=BLOCKS, variant="rslora"),
    "qlora": lambda: QLoRA(rank=4, modules=BLOCKS),
    "embedding": lambda: LoRA(rank=4, modules=["*.embedding", "*.q_proj"]),
}


@pytest.mark.parametrize("path", ["c/c.ckpt", "c/c-peft"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_back_from_either_file(method: str, path: str) -> None:
    trained, fresh = train(METHODS[method]()), prepared(METHODS[method]())
    assert not torch.equal(fresh.net(IDS), trained.net(IDS))
    num_tensors = load_adapters(fresh, path)
    assert num_tensors == sum(p.requires_grad for p in trained.parameters())
    assert torch.equal(fresh.net(IDS), trained.net(IDS))


@pytest.mark.parametrize("path", ["c/c.ckpt", "c/c-peft"])
def test_the_network_alone_takes_the_adapters_of_its_lightning_module(path: str) -> None:
    trained = train(METHODS["lora"]())
    alone = prepared(METHODS["lora"](), network())
    assert load_adapters(alone, path) == 8
    assert torch.equal(alone(IDS), trained.net(IDS))


def test_a_module_around_the_one_that_was_saved_takes_its_adapters() -> None:
    trained = train(METHODS["lora"]())
    outer = prepared(METHODS["lora"](), nn.ModuleDict({"inner": LitLM()}))
    assert load_adapters(outer, "c/c.ckpt") == 8
    assert torch.equal(outer["inner"].net(IDS), trained.net(IDS))


def test_load_from_checkpoint_goes_through_apply() -> None:
    """The way that is documented: build, attach, load."""
    trained = train(METHODS["lora"]())
    module = LitLM()
    apply(module, [METHODS["lora"]()])
    load_adapters(module, "c/c.ckpt")
    predictions = make_trainer().predict(module, make_loader())
    expected = make_trainer().predict(trained, make_loader())
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected))


def test_the_shared_name_of_a_layer_does_not_widen_the_target() -> None:
    """``blocks.0.up`` also ends ``encoder.blocks.0.up``; PEFT matches endings."""
    from peft import PeftModel

    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8))
        module = nn.ModuleDict({"up": inner, "encoder": nn.ModuleDict({"up": nn.Sequential(nn.Linear(8, 8))})})
        module.forward = lambda x: module["up"](x) + module["encoder"]["up"](x)  # type: ignore[method-assign]
        return module

    module = build()
    apply(module, [LoRA(rank=2, modules=["up.0"])])
    nn.init.normal_(module["up"][0].lora_B.default.weight)
    write_peft(module, module.state_dict(), "folder")
    loaded = PeftModel.from_pretrained(build(), "folder")
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), module(x))


# -- refusals -----------------------------------------------------------------------------------------------------
@pytest.fixture
def trained() -> LitLM:
    return train(METHODS["lora"]())


def refused(module: nn.Module, path: str) -> str:
    before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load_adapters(module, path)
    for key, value in before.items():
        assert torch.equal(value, module.state_dict()[key]), f"{key} was touched"
    return str(caught.value)


@pytest.mark.parametrize("path", ["c/c.ckpt", "c/c-peft"])
def test_other_settings_are_refused(trained: LitLM, path: str) -> None:
    assert "saved with rank 4, and the module has rank 8. Write rank=4." in refused(
        prepared(LoRA(rank=8, modules=BLOCKS)), path
    )
    assert "with lora_alpha=8, and the module's have lora_alpha=4 (first: blocks.0.q_proj)" in refused(
        prepared(LoRA(rank=4, alpha=4, modules=BLOCKS)), path
    )
    assert "use_rslora=False, and the module's have use_rslora=True" in refused(
        prepared(LoRA(rank=4, modules=BLOCKS, variant="rslora")), path
    )
    assert "it lacks 4 tensors" in refused(prepared(LoRA(rank=4, modules=["*.q_proj", "*.down"])), path)
    assert "it holds 4 tensors" in refused(prepared(LoRA(rank=4, modules=["*.q_proj"])), path)


def test_another_base_is_refused(trained: LitLM) -> None:
    other = LitLM()
    with torch.no_grad():
        other.net.blocks[0].up.weight[0, 0] += 1
    assert "it was saved on another base" in refused(prepared(METHODS["lora"](), other), "c/c.ckpt")


def test_a_module_without_adapters_is_refused(trained: LitLM) -> None:
    assert "it holds adapters (8 tensors" in refused(LitLM(), "c/c.ckpt")
    with pytest.raises(NothingToTransformError, match=r"apply\(module, \[LoRA\(rank=4, alpha=8\)\]\)"):
        load_adapters(LitLM(), "c/c-peft")


def test_files_that_are_no_adapters_are_refused(trained: LitLM) -> None:
    module = prepared(METHODS["lora"]())
    with pytest.raises(ConfigurationError, match=r"there is nothing at 'none\.ckpt'"):
        load_adapters(module, "none.ckpt")
    Path("empty").mkdir()
    with pytest.raises(ConfigurationError, match="'empty' is neither a checkpoint nor a PEFT folder"):
        load_adapters(module, "empty")
    torch.save({"weights": 1}, "other.ckpt")
    assert "is no Lightning checkpoint" in refused(module, "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"object": LitLM()}}, "objects.ckpt")
    message = refused(module, "objects.ckpt")
    assert "cannot be read as tensors and plain data" in message
    assert "save_hyperparameters(ignore=[...])" in message


def test_peft_folders_of_other_kinds_are_refused(trained: LitLM) -> None:
    module = prepared(METHODS["lora"]())
    config = json.loads(Path("c/c-peft/adapter_config.json").read_text())
    Path("c/c-peft/adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "holds IA3 adapters, and only LORA" in refused(module, "c/c-peft")
    Path("c/c-peft/adapter_model.safetensors").rename("c/c-peft/adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"has no adapter_model\.safetensors; \.bin files are pickles"):
        load_adapters(module, "c/c-peft")


def test_a_base_that_peft_changed_itself_is_not_exported() -> None:
    import peft

    module = network()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")
    peft.inject_adapter_in_model(config, module)
    with pytest.raises(ConfigurationError, match="init_lora_weights='olora' lie on a changed base"):
        write_peft(module, module.state_dict(), "folder")


def test_adapters_of_pefts_own_run_are_read() -> None:
    """A folder that PEFT wrote, with short names and patterns."""
    import peft

    def build() -> Any:
        model = network()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up"], alpha_pattern={"up": 16})
        return peft.get_peft_model(model, config)

    theirs = build()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    theirs.save_pretrained("folder")
    ours = network()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up"], alpha_pattern={"up": 16})
    peft.inject_adapter_in_model(config, ours)
    assert load_adapters(ours, "folder") == 8
    assert torch.equal(ours(IDS), theirs(IDS))
    wrong = prepared(METHODS["lora"](), network())
    assert "with lora_alpha=16, and the module's have lora_alpha=8 (first: blocks.0.up)" in refused(wrong, "folder")
