"""No document of a pack sees another one, under any attention implementation; the loss is that of documents alone."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import make_trainer
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memsave
from lightning_memsave import ConfigurationError, PackedDataset, PackingCollator, document_mask
from lightning_memsave.callbacks._lightning import NAMESPACES
from lightning_memsave.data._forms import IGNORES_POSITIONS, RECURRENT

# Worst seen: 2.6e-7 of the largest logit. Kernels sum in another order over a row of other length.
LOGITS_TOLERANCE = 1e-6
# Worst seen: 8.4e-7 of the largest gradient of a weight.
GRADIENT_TOLERANCE = 5e-6

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    # One layer has a window, the other has not: two masks.
    "qwen2": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gpt_neox": ("GPTNeoX", {}),
}


def make_model(family: str, implementation: str) -> Any:
    transformers = importlib.import_module("transformers")
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **SMALL, max_position_embeddings=128, attn_implementation=implementation, **extra
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def documents(*lengths: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 64, (n,), generator=generator)} for n in lengths]


def packed(*lengths: int, room: int = 40) -> PackedDataset:
    return PackedDataset(documents(*lengths), room, strategy="sequential")


HERE = Path(__file__).parent
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))}
PACKS = (9, 12, 1, 5, 30, 3, 20)  # rows of 27, 33 and 20 tokens


@pytest.mark.parametrize("form", ["config", "auto", "positions", "explicit mask"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_is_not_changed_by_the_one_before_it(family: str, implementation: str, form: str) -> None:
    model = make_model(family, implementation)
    if form == "explicit mask" and getattr(model.config, "sliding_window", None):
        with pytest.raises(ConfigurationError, match="takes the place of the window's"):
            PackingCollator("mask", config=model.config)
        return
    explicit = {"eager": "additive", "sdpa": "mask"}[implementation]
    collator = {
        "config": PackingCollator(config=model.config),
        "auto": PackingCollator(),
        "positions": PackingCollator("positions"),
        "explicit mask": PackingCollator(explicit),  # type: ignore[arg-type]
    }[form]
    one, other, watched, beside = (d["input_ids"] for d in documents(9, 9, 12, 33))
    row = PackedDataset([{"input_ids": beside}], 40)[0]
    logits = []
    for document in (one, other):
        pack = PackedDataset([{"input_ids": document}, {"input_ids": watched}], 21)[0]
        batch = collator([pack, row])
        del batch["labels"]
        with torch.no_grad():
            logits.append(model(**batch).logits[0, 9:21])
    assert torch.equal(*logits)
    with torch.no_grad():
        alone = model(input_ids=watched[None]).logits[0]
    assert (logits[0] - alone).abs().max() <= LOGITS_TOLERANCE * alone.abs().max()
    collator.check(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_document_is_not_changed_under_flex_attention(family: str) -> None:
    # In a process of its own: it compiles a kernel, and torch 2.13's for the CPU has ended a process with a heap error.
    code = (
        f"from test_collate import PackingCollator, make_model\nmodel = make_model({family!r}, 'flex_attention')\n"
        "PackingCollator(config=model.config).check(model)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=PATHS)
    assert done.returncode == 0, done.stderr


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_documents_alone(family: str, implementation: str) -> None:
    model = make_model(family, implementation)
    alone = documents(*PACKS)
    tokens = sum(len(d["input_ids"]) - 1 for d in alone)
    total = 0.0
    for document in alone:
        ids = document["input_ids"][None]
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    expected = gradients(model)
    packs = packed(*PACKS)
    batch = PackingCollator(config=model.config)(list(packs))
    assert batch["input_ids"].shape == (3, 33)
    loss = model(**batch).loss
    loss.backward()
    # Worst seen: 1.0e-7.
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).abs().max() <= GRADIENT_TOLERANCE * expected[name].abs().max(), name


def test_position_ids_alone_contaminate() -> None:
    # The reason for use_cache=False and for no mask of ones: if one of these stops failing, transformers has changed.
    model = make_model("llama", "sdpa")
    collator = PackingCollator("positions")
    for wrong in ({"use_cache": True}, {"attention_mask": "ones"}):

        def forward(batch: dict[str, Any], wrong: dict[str, Any] = wrong) -> Tensor:
            more = {k: torch.ones_like(batch["input_ids"]) if v == "ones" else v for k, v in wrong.items()}
            return model(**{**batch, **more}).logits

        with pytest.raises(ConfigurationError, match="documents see each other in LlamaForCausalLM"):
            collator.check(model, forward=forward)


TAKES_MASKS = pytest.mark.skipif(
    Version(metadata.version("transformers")) < Version("5"),
    reason="encoders and XGLM of transformers 4 take no (B, 1, T, T) mask",
)


@TAKES_MASKS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_bidirectional_model_is_packed_with_a_mask(implementation: str) -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(**SMALL, max_position_embeddings=128, attn_implementation=implementation)
    model = transformers.BertForMaskedLM(config)
    collator = PackingCollator(config=config, causal=False)
    assert collator.form == {"eager": "additive", "sdpa": "mask"}[implementation]
    collator.check(model)
    sample = {"input_ids": [1, 2, 3], "labels": [1, -100, 3]}
    batch = collator([PackedDataset([sample, sample], 8)[0]])
    assert batch["labels"].tolist() == [[1, -100, 3, 1, -100, 3]]  # masked tokens predict themselves


def test_a_bidirectional_model_packed_as_a_causal_one_is_found_out() -> None:
    transformers = importlib.import_module("transformers")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, attn_implementation="sdpa"))

    def forward(batch: dict[str, Any]) -> Tensor:
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits

    with pytest.raises(ConfigurationError, match="documents see each other"):
        PackingCollator("positions").check(model, forward=forward)


@TAKES_MASKS
def test_positions_that_do_not_start_at_zero_are_found_out() -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.RobertaConfig(
        **SMALL, max_position_embeddings=128, attn_implementation="sdpa", pad_token_id=1
    )
    model = transformers.RobertaForMaskedLM(config)
    with pytest.raises(ConfigurationError, match=r"off by .* against the document alone"):
        PackingCollator(config=config, causal=False, pad_token_id=1).check(model)


def test_a_window_lost_to_a_mask_is_found_out() -> None:
    model = make_model("mistral", "sdpa")
    with pytest.raises(ConfigurationError, match="sliding_window=4 takes the place of the window's"):
        PackingCollator("mask", config=model.config)
    with pytest.raises(ConfigurationError, match="against the document alone"):
        PackingCollator("mask").check(model)


def test_check_puts_the_modes_back() -> None:
    model = make_model("llama", "sdpa").train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    PackingCollator().check(model)
    assert [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()


class OwnAttention(nn.Module):
    """A model that is not of transformers: it builds its mask from document_ids on its device."""

    def __init__(self, form: str = "bool", window: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.window = form, window
        self.embedding, self.positions = nn.Embedding(64, 32), nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embedding(batch["input_ids"]) + self.positions(batch["position_ids"])
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mask = document_mask(batch["document_ids"], form=self.form, window=self.window)  # type: ignore[arg-type]
        if self.form == "block":
            from torch.nn.attention.flex_attention import flex_attention

            a = flex_attention(q, k, v, block_mask=mask)
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(a.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("form", ["bool", "additive", "block"])
def test_attention_of_ones_own_uses_document_ids(form: str, window: int | None) -> None:
    collator = PackingCollator("documents")
    model = OwnAttention(form, window)
    collator.check(model, forward=model)
    batch = collator(list(packed(*PACKS)))
    with torch.no_grad():
        # Worst seen: 1.8e-7.
        torch.testing.assert_close(model(batch), OwnAttention("bool", window)(batch), atol=1e-6, rtol=0)


def test_attention_that_ignores_document_ids_is_found_out() -> None:
    class Forgetful(OwnAttention):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward({**batch, "document_ids": torch.zeros_like(batch["document_ids"])})

    model = Forgetful()
    with pytest.raises(ConfigurationError, match=r"documents see each other in Forgetful.*document_mask"):
        PackingCollator("documents").check(model, forward=model)


def test_a_mask_is_the_one_of_its_definition() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 4, 4]])
    for causal in (True, False):
        for window in (None, 1, 2):
            mask = document_mask(ids, causal=causal, window=window)
            assert mask.shape == (2, 1, 6, 6)
            for b in range(2):
                for q in range(6):
                    for k in range(6):
                        seen = ids[b, q] == ids[b, k] and (q >= k or not causal)
                        seen = seen and (window is None or abs(q - k) < window)
                        assert bool(mask[b, 0, q, k]) == bool(seen)
    added = document_mask(ids, form="additive", dtype=torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, document_mask(ids))
    assert float(added.min()) == torch.finfo(torch.bfloat16).min


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)shape \(3,\).*form='flash'.*window=0"):
        document_mask(torch.zeros(3), form="flash", window=0)  # type: ignore[arg-type]


def test_flash_gets_one_row_without_padding() -> None:
    batch = PackingCollator("flash")(list(packed(*PACKS)))
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape == (1, 80)
    assert batch["cu_seq_lens_q"].tolist() == [0, *torch.tensor(PACKS).cumsum(0).tolist()]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 30
    assert not {"attention_mask", "document_ids"} & set(batch)
    # Should the implementation be changed later, the positions count.
    assert batch["use_cache"] is False
    PackingCollator("flash").check(make_model("llama", "sdpa"))


def test_flash_gets_what_transformers_would_read_from_the_positions() -> None:
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    batch = PackingCollator("flash")(list(packed(*PACKS)))
    (q, k), (longest_q, longest_k) = flash.prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert torch.equal(q, batch["cu_seq_lens_q"])
    assert torch.equal(k, batch["cu_seq_lens_k"])
    assert int(longest_q) == int(longest_k) == batch["max_length_q"]


def test_without_a_config_the_batch_is_right_for_flash_too() -> None:
    batch = PackingCollator()(list(packed(*PACKS)))
    assert batch["input_ids"].shape == (3, 33)
    # The lengths cover all rows one after the other, padding as a document.
    assert batch["cu_seq_lens_q"].tolist() == [0, 9, 21, 22, 27, 33, 63, 66, 86, 99]
    assert batch["max_length_q"] == 30
    assert batch["use_cache"] is False


def test_the_first_token_of_a_document_and_padding_are_not_predicted() -> None:
    for form in ("positions", "flash", "mask", "documents"):
        batch = PackingCollator(form)(list(packed(*PACKS)))  # type: ignore[arg-type]
        predicted = batch["labels"] != -100
        assert int(predicted.sum()) == sum(PACKS) - len(PACKS)
        assert torch.equal(batch["labels"][predicted], batch["input_ids"][predicted])


def test_labels_of_the_samples_are_kept() -> None:
    sample = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    batch = PackingCollator()([PackedDataset([sample, {"input_ids": [5, 6], "labels": [5, 6]}], 6)[0]])
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, 6]]


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Do what a flash kernel for packed rows does, in plain torch: all rows are one, cut where the lengths say."""
    assert attention_mask is None
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(kwargs["cu_seq_lens_q"].diff().max())
    batch, heads, tokens, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    assert int(kwargs["cu_seq_lens_q"][-1]) == len(q)
    cut = kwargs["cu_seq_lens_q"].diff().tolist()
    done = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)
        for part in zip(q.split(cut), k.split(cut), v.split(cut))
    ]
    return torch.cat(done, 2)[0].transpose(0, 1).reshape(batch, tokens, heads, width), None


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("attention", "rows"), [("auto", 3), ("flash", 1)])
def test_a_kernel_for_packed_rows_gets_what_it_needs_through_the_model(family: str, attention: Any, rows: int) -> None:
    importlib.import_module("transformers").AttentionInterface.register("varlen_reference", varlen_attention)
    batch = PackingCollator(attention)(list(packed(*PACKS)))
    assert len(batch["input_ids"]) == rows
    loss = make_model(family, "varlen_reference")(**batch).loss
    expected = make_model(family, "sdpa")(**PackingCollator("positions")(list(packed(*PACKS)))).loss
    # Worst seen: 1.2e-7.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_rows_of_one_document_need_no_mask() -> None:
    # Padding continues the positions, so transformers finds nothing packed and runs plain causal attention.
    masking = importlib.import_module("transformers.masking_utils")
    for collator in (PackingCollator("positions"), PackingCollator()):
        alone = masking.find_packed_sequence_indices(collator(documents(7, 30, 12))["position_ids"])
        assert alone is None or not alone.any()  # transformers 5 and 4
        assert masking.find_packed_sequence_indices(collator(list(packed(*PACKS)))["position_ids"]).any()


def test_rows_are_padded_to_the_length_that_was_asked_for() -> None:
    batch = PackingCollator("positions", length=40, pad_token_id=9)(list(packed(*PACKS)))
    assert {tuple(value.shape) for key, value in batch.items() if key != "use_cache"} == {(3, 40)}
    assert (batch["input_ids"][:, 33:] == 9).all()
    with pytest.raises(ConfigurationError, match=r"33 tokens, more than length=30"):
        PackingCollator(length=30)(list(packed(*PACKS)))


def test_values_per_token_are_padded_and_flattened() -> None:
    samples = [
        {"input_ids": [1, 2], "weight": [0.5, 1.0], "box": [[1, 2], [3, 4]]},
        {"input_ids": [3], "weight": [2.0], "box": [[5, 6]]},
    ]
    rows = list(PackedDataset(samples, 2))
    padded = PackingCollator("documents")(rows)
    assert padded["weight"].tolist() == [[0.5, 1.0], [2.0, 0.0]]
    assert padded["box"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert padded["document_ids"].tolist() == [[0, 0], [0, 1]]
    flat = PackingCollator("flash")(rows)
    assert flat["box"].tolist() == [[[1, 2], [3, 4], [5, 6]]]


def test_the_form_follows_the_config() -> None:
    def form(implementation: str, **extra: Any) -> str:
        return PackingCollator(config=make_config(implementation), **extra).form

    assert [form(i) for i in ("sdpa", "eager", "flex_attention")] == [PackingCollator().form] * 3
    for flash in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        assert form(flash) == form(flash, causal=False) == "flash"
    assert (form("sdpa", causal=False), form("eager", causal=False)) == ("mask", "additive")
    for implementation, extra in (("paged|something", {}), ("flex_attention", {"causal": False})):
        with pytest.raises(ConfigurationError, match="load the model with attn_implementation='sdpa'"):
            form(implementation, **extra)


def make_config(implementation: str) -> Any:
    config = importlib.import_module("transformers").LlamaConfig(**SMALL)
    config._attn_implementation_internal = implementation
    return config


OLDER = {
    # Its masks ignore positions, and take one from outside.
    "OPT": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "sdpa", "mask"),
    "XGLM": ({"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, "eager", "additive"),
}


@pytest.mark.parametrize("family", ["OPT", pytest.param("XGLM", marks=TAKES_MASKS)])
def test_a_model_whose_masks_ignore_positions_gets_a_mask(family: str) -> None:
    transformers = importlib.import_module("transformers")
    extra, implementation, form = OLDER[family]
    config = getattr(transformers, f"{family}Config")(
        **{**SMALL, **extra}, max_position_embeddings=128, attn_implementation=implementation
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(ConfigurationError, match="documents see each other"):
        PackingCollator("positions").check(model)
    for collator in (PackingCollator(config=config), PackingCollator.for_model(model)):
        assert collator.form == form
        collator.check(model)


def test_a_model_with_windows_whose_masks_ignore_positions_is_refused() -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ConfigurationError, match="takes the place of the window's"):
        PackingCollator(config=config)


def test_the_form_is_chosen_by_what_the_model_does() -> None:
    assert PackingCollator.for_model(make_model("mistral", "sdpa")).form == PackingCollator().form
    transformers = importlib.import_module("transformers")
    model = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    )
    with pytest.raises(
        ConfigurationError, match=r"(?s)RwkvForCausalLM.*attention='auto'.*'positions'.*'mask'.*'additive'"
    ):
        PackingCollator.for_model(model)


def mask_calls(tree: ast.AST) -> list[ast.Call]:
    names = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask", "mask_function"}
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in names]


def reads_positions(source: str) -> bool:
    """Whether every mask that a modeling file builds is given the positions."""
    calls = mask_calls(ast.parse(source))
    named = [{k.arg: k.value for k in call.keywords} for call in calls]
    collected = '"position_ids": ' in source  # the arguments of several masks in one dict
    return bool(calls) and all(
        (None in k and collected) or ("position_ids" in k and getattr(k["position_ids"], "value", "") is not None)
        for k in named
    )


def test_every_model_whose_masks_ignore_positions_is_known() -> None:
    transformers = importlib.import_module("transformers")
    names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    sources = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        sources.update(dict.fromkeys(re.findall(r"^class (\w+)", text, re.MULTILINE), text))
    found = {kind: sources.get(name if isinstance(name, str) else name[0]) for kind, name in names.items()}
    unknown = (
        {kind for kind, text in found.items() if text and not reads_positions(text)} - IGNORES_POSITIONS - RECURRENT
    )
    assert not unknown, "add them to IGNORES_POSITIONS"
    assert {"llama", "qwen2", "mistral", "gemma3_text", "gpt_neox"} <= {
        k for k, t in found.items() if t and reads_positions(t)
    }


def test_a_recurrent_model_is_refused() -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="lfm2 has layers that carry a state"):
        PackingCollator(config=config)
    model = transformers.Lfm2ForCausalLM(config)
    with pytest.raises(ConfigurationError, match="documents see each other in Lfm2ForCausalLM"):
        PackingCollator("positions").check(model)


def test_wrong_arguments_are_listed() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)attention='sdpa'.*length=0"):
        PackingCollator("sdpa", length=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="bidirectional models read no document from positions"):
        PackingCollator("positions", causal=False)
    with pytest.raises(ConfigurationError, match="sample 0 has no tokens"):
        PackingCollator()([{"input_ids": []}])
    with pytest.raises(ConfigurationError, match=r"\['text'\].*keys="):
        PackingCollator()([{"input_ids": [1], "text": "a"}])
    with pytest.raises(ConfigurationError, match="no token embedding; write vocabulary"):
        PackingCollator().check(nn.Linear(2, 2))


def make_module(namespace: Any) -> Any:
    class Module(namespace.LightningModule):  # type: ignore[misc, name-defined]
        """A plain module of a user: nothing in it knows of packing."""

        def __init__(self) -> None:
            super().__init__()
            self.net = make_model("llama", "sdpa")
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss = self.net(**batch).loss
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda n: n.__name__)
def test_an_unmodified_module_trains_on_packs(namespace: Any) -> None:
    module = make_module(namespace)
    collator = pickle.loads(pickle.dumps(PackingCollator(config=module.net.config)))
    loader = DataLoader(packed(*PACKS), batch_size=3, collate_fn=collator, num_workers=1)
    make_trainer(namespace, max_epochs=8).fit(module, loader)
    assert module.losses[-1] < 0.7 * module.losses[0]


SAVERS = {
    "checkpointing": lambda: lightning_memsave.ActivationCheckpointing(),
    "tiling": lambda: lightning_memsave.TiledCompute(tile_tokens=8),
    "offloading": lambda: lightning_memsave.ActivationOffloading(device="activations", min_bytes=256),
    "chunked loss": lambda: lightning_memsave.ChunkedLoss(),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_the_savers_of_long_sequences_take_packs_as_they_are(saver: str) -> None:
    losses = []
    for callbacks in ([], [SAVERS[saver]()]):
        module = make_module(pl)
        loader = DataLoader(packed(*PACKS), batch_size=3, collate_fn=PackingCollator(config=module.net.config))
        make_trainer(pl, max_epochs=3, callbacks=callbacks).fit(module, loader)
        losses.append(module.losses)
    # Worst seen: 1.2e-7 (chunked loss; the others are bitwise).
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
