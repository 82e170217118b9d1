"""``memsave merge``: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memsave import AdapterCheckpoint, LoRA, QLoRA
from lightning_memsave.cli.main import main

IDS = torch.arange(32).view(2, 16)
# Largest logit about 2; worst seen 3.6e-7 (fp32, products in another order).
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def pretrained(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


class LitLlama(pl.LightningModule):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = pretrained(folder).train()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(folder: Path, method: Any) -> LitLlama:
    module = LitLlama(folder)
    savers = [method, AdapterCheckpoint(export_peft=True), ModelCheckpoint("c", filename="c")]
    make_trainer(callbacks=savers, enable_checkpointing=True).fit(module, make_loader())
    return module.eval()


def merge(*arguments: Any) -> int:
    return main(["merge", *map(str, arguments)])


def merge_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert merge(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("adapter", ["c/c.ckpt", "c/c-peft"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_lora_run_merges_into_the_base(
    base: Path, variant: Any, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(base, LoRA(rank=4, variant=variant))
    result = merge_json(capsys, "--base", base, "--adapter", adapter, "--output", "merged")
    assert (result["base_weights"], result["trained_on"], result["num_layers"]) == ("original", None, 14)
    assert result["max_logit_difference"] < TOLERANCE < result["max_logit"]
    assert result["samples"] == "4 x 32 random tokens (no tokenizer)"
    merged = pretrained(Path("merged"))
    torch.testing.assert_close(merged(IDS).logits, trained.model(IDS).logits, rtol=0, atol=TOLERANCE)
    assert (merged(IDS).logits - pretrained(base)(IDS).logits).abs().max() > 1000 * TOLERANCE
    assert Path("merged/model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_qlora_run_merges_into_what_training_saw(base: Path, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(base, QLoRA(rank=4, kind=kind))
    result = merge_json(capsys, "--base", base, "--adapter", "c/c.ckpt", "--output", "merged")
    assert (result["base_weights"], result["trained_on"], result["num_quantized"]) == ("dequantized", kind, 10)
    assert result["num_layers"] == 14  # four more are too small to quantize
    assert result["max_logit_difference"] < TOLERANCE
    merged = pretrained(Path("merged"))
    torch.testing.assert_close(merged(IDS).logits, trained.model(IDS).logits, rtol=0, atol=TOLERANCE)


def test_the_original_weights_differ_by_the_rounding_of_training_and_it_is_said(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(base, QLoRA(rank=4))
    arguments = ("--base", base, "--adapter", "c/c.ckpt", "--output", "merged", "--base-weights", "original")
    result = merge_json(capsys, *arguments)
    merged = pretrained(Path("merged"))
    actual = float((merged(IDS).logits - trained.model(IDS).logits).detach().abs().max())
    assert actual > 100 * TOLERANCE
    assert 0.2 < result["max_logit_difference"] / actual < 5  # other tokens, the same rounding
    assert merge(*arguments[:5], "other", "--base-weights", "original") == 0
    out = capsys.readouterr().out
    assert "merged 14 layers into original weights (trained on nf4)" in out
    assert "largest logit difference to the unmerged model: " in out
    assert "wrote other" in out


def test_a_peft_folder_of_a_qlora_run_is_merged_into_rounded_weights_when_asked(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(base, QLoRA(rank=4))
    merge_json(capsys, "--base", base, "--adapter", "c/c-peft", "--output", "merged", "--quantized-as", "nf4")
    torch.testing.assert_close(
        pretrained(Path("merged"))(IDS).logits, trained.model(IDS).logits, rtol=0, atol=TOLERANCE
    )


def test_a_tied_head_with_an_adapter_is_written_untied(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(base, LoRA(rank=4, modules=["*.lm_head", "*.q_proj"]))
    result = merge_json(capsys, "--base", base, "--adapter", "c/c.ckpt", "--output", "merged")
    assert result["untied"] == ["lm_head"]
    merged = pretrained(Path("merged"))
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(merged(IDS).logits, trained.model(IDS).logits, rtol=0, atol=TOLERANCE)


def test_the_dtype_is_chosen(base: Path) -> None:
    train(base, LoRA(rank=4))
    assert merge("--base", base, "--adapter", "c/c.ckpt", "--output", "merged", "--dtype", "bf16") == 0
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file("merged/model.safetensors").values()} == {torch.bfloat16}


def test_too_large_a_difference_writes_nothing_and_ends_with_1(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(base, QLoRA(rank=4))
    arguments = ("--base", base, "--adapter", "c/c.ckpt", "--output", "merged", "--base-weights", "original")
    assert merge(*arguments, "--max-difference", "1e-6") == 1
    assert "that is more than --max-difference 1e-06: nothing was written" in capsys.readouterr().out
    assert not Path("merged").exists()
    assert not Path("merged.partial").exists()


def test_an_existing_output_is_never_overwritten(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("merged").mkdir()
    assert merge("--base", base, "--adapter", "c.ckpt", "--output", "merged") == 2
    assert "'merged' exists, and nothing is overwritten" in capsys.readouterr().err


@pytest.fixture
def trained(base: Path) -> Path:
    train(base, LoRA(rank=4))
    return base


def test_bad_input_ends_with_2_and_says_what_is_wrong(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: Any) -> str:
        capsys.readouterr()
        assert merge(*arguments, "--output", "merged") == 2
        assert not Path("merged").exists()
        return capsys.readouterr().err

    good = ("--base", trained, "--adapter", "c/c.ckpt")
    assert "there is nothing at --adapter 'none.ckpt'" in said("--base", trained, "--adapter", "none.ckpt")
    assert "cannot be loaded as a Hugging Face model" in said("--base", "./none", "--adapter", "c/c.ckpt")
    assert "'c' is no PEFT folder" in said("--base", trained, "--adapter", "c")
    assert "the adapters were trained on floating weights" in said(*good, "--base-weights", "dequantized")
    assert "so there is no text to compare on. Leave --prompt out" in said(*good, "--prompt", "Hello")
    Path("text.ckpt").write_text("not a checkpoint")
    assert "cannot be read as tensors and plain data" in said("--base", trained, "--adapter", "text.ckpt")
    torch.save({"state_dict": {}}, "plain.ckpt")
    assert "holds no adapters written by LoRA or QLoRA" in said("--base", trained, "--adapter", "plain.ckpt")
    torch.save({"weights": 1}, "other.ckpt")
    assert "is no Lightning checkpoint" in said("--base", trained, "--adapter", "other.ckpt")


def test_a_base_that_is_no_hugging_face_model_of_tokens_is_refused_with_the_way_out(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTConfig, ViTModel

    def said(base: str) -> str:
        capsys.readouterr()
        assert merge("--base", base, "--adapter", "c/c.ckpt", "--output", "merged") == 2
        error = capsys.readouterr().err
        assert error.startswith("memsave merge: --base ")
        assert "Other modules are merged in Python: lightning_memsave.merge_adapters(module)." in error
        return error

    assert "'c/c.ckpt' is a file. Give the folder or the hub name of a Hugging Face model" in said("c/c.ckpt")
    Path("timm").mkdir()
    Path("timm/config.json").write_text('{"architecture": "resnet18"}')
    assert "Unrecognized model in timm" in said("timm")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained("vit")
    assert "'vit' (ViTModel) reads no token ids" in said("vit")


def test_an_encoder_decoder_is_merged(capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained("t5")
    model = T5ForConditionalGeneration.from_pretrained("t5")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False))
    adapted.save_pretrained("adapters")
    result = merge_json(capsys, "--base", "t5", "--adapter", "adapters", "--output", "merged")
    assert result["num_layers"] == 6
    assert result["max_logit_difference"] < TOLERANCE
    merged = T5ForConditionalGeneration.from_pretrained("merged").eval()
    outputs = [net.eval()(input_ids=IDS, decoder_input_ids=IDS).logits for net in (merged, adapted)]
    torch.testing.assert_close(*outputs, rtol=0, atol=TOLERANCE)


def test_quantized_as_is_refused_where_the_checkpoint_knows(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(base, QLoRA(rank=4))
    arguments = ("--base", base, "--adapter", "c/c.ckpt", "--output", "merged")
    assert merge(*arguments, "--quantized-as", "nf4") == 2
    assert "these were trained on nf4" in capsys.readouterr().err


def test_another_base_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, "other")
    model = pretrained(trained)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    model.save_pretrained("other")
    assert merge("--base", "other", "--adapter", "c/c.ckpt", "--output", "merged") == 2
    assert "it was saved on another base" in capsys.readouterr().err


def test_adapters_of_another_model_are_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = ModelCheckpoint("c", filename="c")
    make_trainer(callbacks=[LoRA(rank=4), saver], enable_checkpointing=True).fit(LitLM(), make_loader())
    assert merge("--base", base, "--adapter", "c/c.ckpt", "--output", "merged") == 2
    assert "are of another model" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge("--help")
    assert "memsave merge --base" in capsys.readouterr().out
