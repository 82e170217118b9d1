"""One measured fine-tune in one fresh process: ours under Lightning, or the same method under HF Trainer.

``python _trainer_runs.py '{"side": "ours", "method": "lora", ...}'`` prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import lightning.pytorch as pl
import torch
from smollm2 import PACKAGED, load_model, model_folder, text_rows
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from lightning_memsave.memory.host import host_allocator, host_peak_bytes, reset_host_peak
from lightning_memsave.memory.tracker import track_memory

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRACKED_STEP = 2  # the first with optimizer state from its start on
LEARNING_RATES = {"adamw_8bit": 2e-5, "adafactor": 2e-5, "lora": 2e-4, "qlora": 2e-4}
# Ours with everything that is exact or close -> the method of HF Trainer that it is measured beside.
BESIDE = {
    "split_master": "adamw_8bit",
    "lora_chunked": "lora",
    "lora_bf16_base": "lora",
    "qlora_chunked": "qlora",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    Args:
        side: ``ours`` or ``hf``.
        method: ``adamw_8bit``, ``adafactor`` (both full fine-tuning), ``lora`` or ``qlora``, or one of ``BESIDE``; all
            with checkpointing.
        steps: Optimizer steps.
        batch_size: Rows in a batch.
        tokens: Tokens in a row.
        model: Which model, as in ``examples/smollm2.py``.
        tracked: Count live tensor bytes instead of the process's; such a run is not timed.
        threads: CPU threads of the training process.
        host_trim: ``AllocatorSettings``' option, ours only; empty leaves the allocator alone.

    """

    side: str
    method: str
    steps: int = 4
    batch_size: int = 4
    tokens: int = 256
    model: str = PACKAGED
    tracked: bool = False
    threads: int = 1
    host_trim: str = ""


class Clock:
    """Seconds, losses and live bytes of the steps, taken at the same places on both sides."""

    def __init__(self, tracked_step: int) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0
        self.by_category: dict[str, int] = {}
        self._tracked_step = tracked_step
        self._tracker: Any = None
        self._start = self._cpu_start = 0.0

    def start(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if len(self.seconds) + 1 == self._tracked_step:
            self._tracker = track_memory(model, optimizers=[optimizer]).__enter__()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)
        if self._tracker is not None:
            self._tracker.__exit__(None, None, None)
            measurement, self._tracker = self._tracker.measurement(), None
            self.peak_bytes, self.by_category = measurement.peak_bytes, measurement.by_category


def run_ours(job: Job, clock: Clock) -> None:
    from finetune import LanguageModel

    class Timing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            clock.start(module, trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            clock.stop()
            clock.losses.append(outputs["loss"].item())

    method = recipe(job)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=job.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**method, "callbacks": [Timing(), *method["callbacks"]]},
    )
    loader = DataLoader(text_rows(job.model, job.tokens), batch_size=job.batch_size)  # type: ignore[arg-type]
    module = LanguageModel(job.model, LEARNING_RATES[BESIDE.get(job.method, job.method)])
    module.configure_model()
    reset_host_peak()
    trainer.fit(module, loader)


def recipe(job: Job) -> dict[str, Any]:
    """Return what the Trainer is given: the method of HF Trainer, or ours with more savers."""
    from lightning_memsave import (
        ActivationCheckpointing,
        AllocatorSettings,
        BF16Precision,
        ChunkedLoss,
        EarlyZeroGrad,
        GradientRelease,
        LoRA,
        LowMemoryOptimizer,
        QLoRA,
    )

    made: dict[str, Any] = {
        "adamw_8bit": lambda: {"callbacks": [LowMemoryOptimizer("adamw_8bit"), EarlyZeroGrad()]},
        "adafactor": lambda: {"callbacks": [LowMemoryOptimizer("adafactor"), EarlyZeroGrad()]},
        "lora": lambda: {"callbacks": [LoRA(rank=8), EarlyZeroGrad()]},
        "qlora": lambda: {"callbacks": [QLoRA(rank=8), EarlyZeroGrad()]},
        "split_master": lambda: {
            "callbacks": [LowMemoryOptimizer("adamw_split_master", keep_32bit=[]), GradientRelease(), ChunkedLoss()],
            "plugins": [BF16Precision("split")],
        },
        "lora_chunked": lambda: {"callbacks": [LoRA(rank=8), EarlyZeroGrad(), ChunkedLoss()]},
        "lora_bf16_base": lambda: {
            "callbacks": [LoRA(rank=8, frozen_dtype="bf16"), EarlyZeroGrad(), ChunkedLoss()],
            "precision": "bf16-mixed",
        },
        "qlora_chunked": lambda: {"callbacks": [QLoRA(rank=8), EarlyZeroGrad(), ChunkedLoss()]},
    }[job.method]()
    host = [AllocatorSettings(host_trim=job.host_trim)] if job.host_trim else []
    return {**made, "callbacks": [*made["callbacks"], ActivationCheckpointing(), *host]}


def run_hf(job: Job, clock: Clock) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timing(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            clock.start(model, getattr(optimizer, "optimizer", optimizer))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            clock.losses.append(loss.item())
            return loss

    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.steps,
        learning_rate=LEARNING_RATES[job.method],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.01,
        optim={"adamw_8bit": "adamw_8bit", "adafactor": "adafactor"}.get(job.method, "adamw_torch"),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=hf_model(job),
        args=settings,
        train_dataset=text_rows(job.model, job.tokens),
        data_collator=lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)},
        callbacks=[Timing()],
    )
    reset_host_peak()
    trainer.train()


def hf_model(job: Job) -> Any:
    """Return the model as HF's own recipe for the method prepares it."""
    if job.method not in ("lora", "qlora"):
        return load_model(job.model)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if job.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_folder(job.model), dtype=torch.float32, quantization_config=quantization
        )
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model = load_model(job.model)
    return get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )


def result(job: Job, clock: Clock) -> dict[str, Any]:
    """Return what the run took; the first step pays for lazy setup and is not timed."""
    found: dict[str, Any] = {"losses": [round(loss, 4) for loss in clock.losses]}
    if job.tracked:
        return {**found, "tracked_peak_bytes": clock.peak_bytes, "by_category": clock.by_category}
    return {
        **found,
        "step_seconds": statistics.median(clock.seconds[1:]),
        "step_cpu_seconds": statistics.median(clock.cpu_seconds[1:]),
        "peak_rss_bytes": host_peak_bytes(),
        "allocator": host_allocator(),
    }


def main(text: str) -> None:
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads)
    clock = Clock(TRACKED_STEP if job.tracked else 0)
    if job.side == "hf":
        job = replace(job, method=BESIDE.get(job.method, job.method))
    {"ours": run_ours, "hf": run_hf}[job.side](job, clock)
    print(json.dumps(result(job, clock)))


if __name__ == "__main__":
    main(sys.argv[1])
