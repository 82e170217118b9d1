"""Small models of transformers inside a LightningModule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import generator, loader
from .tasks import NUM_BATCHES, Task


class HfLlama(Task):
    """A causal model of transformers, given its labels."""

    def make_network(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,  # linear layers of 4096 values, which quantization takes
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        self.model = LlamaForCausalLM(config).train()

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


class HfBert(Task):
    """A classifier of transformers with a new head; the batch is what its collator makes."""

    def make_network(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=64,
            hidden_size=64,  # linear layers of 4096 values, which quantization takes
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            num_labels=3,
        )
        self.model = BertForSequenceClassification(config).train()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


def classification_batches() -> Any:
    g = generator()
    return loader(
        [
            {
                "input_ids": torch.randint(0, 64, (4, 8), generator=g),
                "attention_mask": (torch.arange(8) < torch.randint(4, 9, (4, 1), generator=g)).long(),
                "labels": torch.randint(0, 3, (4,), generator=g),
            }
            for _ in range(NUM_BATCHES)
        ]
    )
