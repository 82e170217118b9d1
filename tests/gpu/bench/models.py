"""Random models of real shapes and random text: the same for every framework, with no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu.bench.rows import SHAPES, ImageShape, Row
from torch.utils.data import Dataset

__all__ = ["SyntheticImages", "SyntheticTokens", "dataset", "llama_config", "random_model", "saved_model"]

SEED = 0
DISTINCT_TOKENS = 512  # few enough that eight steps lower the loss, so that a run that does not learn is seen


def llama_config(name: str) -> Any:
    """Return the transformers config of a shape."""
    from transformers import LlamaConfig

    shape = SHAPES[name]
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        use_cache=False,
    )


def random_model(name: str, device: str) -> Any:
    """Return a bf16 model with the same random weights every time, built on the device."""
    from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

    torch.manual_seed(SEED)
    shape = SHAPES[name]
    with torch.device(device):
        if isinstance(shape, ImageShape):
            config = ViTConfig(
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                image_size=shape.image,
                patch_size=shape.patch,
                num_labels=1000,
            )
            return ViTForImageClassification(config).to(torch.bfloat16).train()
        return AutoModelForCausalLM.from_config(
            llama_config(name), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).train()


def saved_model(name: str, device: str, scratch: Path) -> Path:
    """Return a folder with the same model on disk: HF quantizes only what it loads."""
    folder = scratch / f"{name}-{device}"
    if not (folder / "config.json").exists():
        random_model(name, device).save_pretrained(folder)
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return folder


class SyntheticImages(Dataset):
    """``row.steps`` batches of ``(3, image, image)`` bf16 images with labels, the same every time."""

    def __init__(self, row: Row) -> None:
        shape = SHAPES[row.shape]
        generator = torch.Generator().manual_seed(SEED)
        self.images = torch.randn(row.batch, 3, shape.image, shape.image, generator=generator).to(torch.bfloat16)
        self.length = row.steps * row.batch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index %= len(self.images)  # the same few images: a run that does not learn is seen
        return {"pixel_values": self.images[index], "labels": torch.tensor(index)}


def dataset(row: Row) -> Dataset:
    """Return the data of a row."""
    return (SyntheticImages if isinstance(SHAPES[row.shape], ImageShape) else SyntheticTokens)(row)


class SyntheticTokens(Dataset):
    """``row.steps`` batches of ``(tokens,)`` ids with labels, the same every time."""

    def __init__(self, row: Row) -> None:
        vocabulary = min(DISTINCT_TOKENS, SHAPES[row.shape].vocabulary)
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(0, vocabulary, (row.steps * row.batch, row.tokens), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}
