"""The same row with HF Trainer, peft and bitsandbytes, as their documentation sets them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu.bench.meter import Meter
from gpu.bench.models import SyntheticTokens, random_model, saved_model
from gpu.bench.rows import Row

__all__ = ["train"]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _quantized_with_adapters(row: Row, device: str, scratch: Path) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved_model(row.shape, device, scratch),
        quantization_config=config,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        device_map={"": device},
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))


def train(row: Row, meter: Meter, device: str, scratch: Path) -> None:
    """Train the row's model for its steps."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class MeterCallback(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.step_begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step_end()

    model = random_model(row.shape, device) if row.method == "full" else _quantized_with_adapters(row, device, scratch)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch / "hf"),
            per_device_train_batch_size=row.batch,
            num_train_epochs=1,
            learning_rate=row.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_bnb_8bit",
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=device == "cpu",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
        ),
        train_dataset=SyntheticTokens(row),
        callbacks=[MeterCallback()],
    )
    trainer.train()
    meter.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
