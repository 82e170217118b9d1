"""One row per method: what it saves, what it costs, and whether the numbers stay the same.

The docs table, the presets, the contract tests and the planner iterate over ``CATALOG``. A new method is one file
and one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CATALOG", "Method", "method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One memory-saving method.

    Args:
        name: The public class.
        group: What it saves on.
        saves: Bytes saved, as a formula in named shapes.
        costs: What it costs in time or in other memory.
        numerics: ``exact`` (bitwise equal), ``bounded`` (documented error) or ``statistical`` (another optimizer or
            parametrization: compare losses).
        use_when: One sentence for the methods page.
        measured: A measured number and where it was measured; empty for what only observes.
        requires: Optional libraries, by import name.
        init_args: Arguments with which the contract tests build it.
        source: Paper or library.
        slot: The Trainer argument it is passed to.

    """

    name: str
    group: Literal["activations", "weights", "optimizer", "gradients", "allocator", "checkpoint", "observation"]
    saves: str
    costs: str
    numerics: Literal["exact", "bounded", "statistical"]
    use_when: str
    measured: str = ""
    requires: tuple[str, ...] = ()
    init_args: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    slot: Literal["callbacks", "strategy", "plugins"] = "callbacks"

    @property
    def class_path(self) -> str:
        """The path to write after ``class_path:`` in a LightningCLI YAML."""
        return f"lightning_memsave.{self.name}"


# Links from docs/methods.md.
_DEMO = "[SmolLM2-135M demo](benchmarks/smollm2-135m-demo_cpu_202611.md)"
_CURVES = "[SmolLM2-135M, every optimizer](benchmarks/smollm2-135m-convergence_cpu_202611.md)"
_BENCH = "[SmolLM2-135M beside HF Trainer](benchmarks/smollm2-135m_cpu_202611.md)"

CATALOG: tuple[Method, ...] = (
    Method(
        name="ActivationCheckpointing",
        group="activations",
        saves="what a block keeps for backward but its input: saved - batch * tokens * hidden * itemsize bytes each",
        costs="one more forward of the blocks per step (about 1/3 of the step)",
        numerics="exact",
        use_when="activations dominate: long sequences, large batches, deep models",
        measured="activations at the peak 1505 -> 0 MiB: " + _DEMO,
        source="Chen et al. 2016, https://arxiv.org/abs/1604.06174",
    ),
    Method(
        name="ActivationOffloading",
        group="activations",
        saves="what blocks save for backward, but for two blocks; beside checkpointing their inputs: "
        "(layers - 2) * batch * tokens * hidden * itemsize bytes",
        costs="a copy each way, beside the computation on CUDA; the same bytes of host memory or disk",
        numerics="exact",
        use_when="block inputs dominate, after checkpointing: long sequences on one accelerator",
        measured="process growth of 32 blocks that keep 16 MiB each: 534 -> 118 MiB with device=<directory>",
        init_args={"device": "activations", "min_bytes": 1},
        source="Rhu et al. 2016, https://arxiv.org/abs/1602.08124",
    ),
    Method(
        name="SavedActivationPrecision",
        group="activations",
        saves="itemsize - 1 - 4 / 256 bytes of each value a block saves; 7/8 of a bool mask",
        costs="rounding each saved tensor and back, element by element",
        numerics="bounded",
        use_when="recomputing costs too much time: half (bf16) to three quarters (fp32) less saved",
        measured="saved bytes of an MLP block in fp32 -74.6 %",
        init_args={"min_values": 1},
        source="Chen et al. 2021, https://arxiv.org/abs/2104.14129",
    ),
    Method(
        name="AttentionKernel",
        group="activations",
        saves="scores, where they were kept: batch * heads * tokens * tokens * itemsize bytes a layer; repeated key "
        "and value heads: 2 * batch * (heads - key_heads) * tokens * head_dim * itemsize",
        costs="a pass over each mask per step, and about a microsecond per torch function called from Python",
        numerics="bounded",
        use_when="attention, first of all; it says which layers run a slow kernel and why",
        measured="saved activations of 4 layers of SmolLM2-135M's shape, 1 x 2048 tokens, fp32 on CPU: made with eager "
        "attention 967 -> 367 MiB; sdpa with padding 455 -> 431 MiB (repeated heads)",
        source="Dao 2023, https://arxiv.org/abs/2307.08691",
    ),
    Method(
        name="TiledCompute",
        group="activations",
        saves="inside MLPs and norms: about 4 * batch * (tokens - tile_tokens) * intermediate * itemsize bytes",
        costs="one more forward of those modules per step",
        numerics="bounded",
        use_when="sequences of tens of thousands of tokens, beside checkpointing and chunked loss",
        measured="norm and MLP of SmolLM2-135M, 8192 tokens, tiles of 1024, CPU: 343 -> 94 MB, 1.16 of their time",
        init_args={"modules": ["Linear"], "tile_tokens": 2},
        source="Bekman et al. 2025, https://arxiv.org/abs/2506.13996",
    ),
    Method(
        name="ChunkedLoss",
        group="activations",
        saves="logits, fp32 copy, softmax, gradient: tokens * vocabulary * (itemsize + 12) bytes, but for one chunk",
        costs="no time with mean and sum; the gradient of a trainable head is held from the forward on",
        numerics="bounded",
        use_when="a large vocabulary: language models, thousands of classes",
        measured="head of 49152 x 576, 1024 tokens, CPU: 604 -> 167 MB trained, 54 MB frozen; 0.87 of the time",
        source="Hsu et al. 2024, https://arxiv.org/abs/2410.10989",
    ),
    Method(
        name="WeightQuantization",
        group="weights",
        saves="frozen linear weights: 4.127 bits a value (nf4/fp4 with double quantization), 4.5 without, 8 (int8)",
        costs="dequantization in every forward and backward of a quantized layer",
        numerics="bounded",
        use_when="the weights are frozen and do not fit",
        measured="frozen weights 513 -> 161 MiB with nf4, the embedding stays fp32: " + _DEMO,
        requires=("bitsandbytes",),
        init_args={"kind": "nf4"},
        source="Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; Dettmers et al. 2022, https://arxiv.org/abs/2208.07339",
    ),
    Method(
        name="LoRA",
        group="weights",
        saves="gradients and optimizer state of every frozen weight: 12 bytes a frozen fp32 parameter under AdamW",
        costs="two thin matrix products per adapted layer; rank * (in + out) trained values each",
        numerics="statistical",
        use_when="a fine-tune may train a low-rank change instead of every weight",
        measured="tensor peak 1745 (full, adamw_8bit) -> 1245 MB: " + _BENCH,
        requires=("peft",),
        init_args={"rank": 8},
        source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    ),
    Method(
        name="QLoRA",
        group="weights",
        saves="of N fp32 values, 16 N bytes of weight, gradient and AdamW state become 0.516 N + 16 rank (in + out)",
        costs="those of WeightQuantization and of LoRA",
        numerics="statistical",
        use_when="fine-tuning a model whose 16-bit weights alone do not fit",
        measured="tensor peak 3750 -> 862 MiB, -77 %: " + _DEMO,
        requires=("bitsandbytes", "peft"),
        init_args={"rank": 16},
        source="Dettmers et al. 2023, https://arxiv.org/abs/2305.14314",
    ),
    Method(
        name="AdapterCheckpoint",
        group="checkpoint",
        saves="every frozen weight in every checkpoint file: 4 bytes a frozen fp32 parameter on disk",
        costs="the base model must be at hand when a checkpoint is loaded; its fingerprint is checked",
        numerics="exact",
        use_when="adapters or few layers are trained; attached by LoRA and QLoRA",
        measured="29.9 MB a checkpoint with Adam moments: LoRA r=8 on the SmolLM2-135M shape",
    ),
    Method(
        name="CheckpointRehearsal",
        group="checkpoint",
        saves="nothing: writes, reads and compares one checkpoint after the first step, which finds a bad one then",
        costs="the size of one checkpoint on disk and the time to write and read it, once",
        numerics="exact",
        use_when="with an optimizer or strategy whose checkpoints were never resumed here",
    ),
    Method(
        name="LowMemoryOptimizer",
        group="optimizer",
        saves=(
            "state bytes a value: AdamW 8; adamw_8bit 2 + 8/256; adamw_4bit 1 + 8/128; adam_mini, muon 4; adafactor ~0"
        ),
        costs="quantization of the state in each step; another update rule where the name says so",
        numerics="statistical",
        use_when="full-parameter training: optimizer state is the largest part",
        measured="state 1026 -> 422 MiB with adamw_8bit, the embedding stays 32-bit: " + _DEMO,
        requires=("bitsandbytes",),
        init_args={"name": "adamw_8bit"},
        source="Dettmers et al. 2022, https://arxiv.org/abs/2110.02861",
    ),
    Method(
        name="OptimizerOffload",
        group="optimizer",
        saves="all state on the device: 8 bytes a trained fp32 value under AdamW; gradients=True: gradients too",
        costs="weights and gradients cross in each step, which runs on the host; on disk: the state is read, written",
        numerics="exact",
        use_when="full-parameter training with little device memory and enough host memory, or a fast local disk",
        measured="state in files, 25M fp32 values: resident set 742 -> 520 MB (moments: 202 MB), training step 1.17x",
        init_args={"device": "optimizer-state"},
        source="Ren et al. 2021, https://arxiv.org/abs/2101.06840",
    ),
    Method(
        name="EarlyZeroGrad",
        group="gradients",
        saves="all gradients during the next forward: itemsize bytes a trainable parameter",
        costs="nothing; gradients are None in on_train_batch_end",
        numerics="exact",
        use_when="always",
        measured="tensor peak -25 % where activations are as large as gradients",
    ),
    Method(
        name="GradientRelease",
        group="gradients",
        saves="all gradients but the largest tensor's: itemsize bytes a trainable parameter",
        costs="one optimizer call a parameter; two_pass clipping: a second backward; accumulation: copies to the host",
        numerics="exact",
        use_when="all parameters train and gradients are a large part: beside an optimizer with small state",
        measured="tensor peak 611 -> 515 MiB at 1.02 times the step time, 29M parameters with AdamW (CPU)",
        init_args={"clip": "two_pass", "accumulate": "host"},
        source="Lv et al. 2023, https://arxiv.org/abs/2306.09782",
    ),
    Method(
        name="BlockDDPStrategy",
        group="gradients",
        saves="DDP's buckets, a second copy of all gradients: itemsize bytes a trainable parameter",
        costs="4 to 10 % of a step over DDP (two CPU processes, gloo); three buckets (75 MiB) during backward",
        numerics="exact",
        use_when='data parallel on several devices: strategy="memsave_ddp" instead of "ddp"',
        measured="process peak in weights (96 MiB, AdamW, 4 MiB buckets): 5.31 -> 4.32, 3.47 with GradientRelease",
        source="Li et al. 2020, https://arxiv.org/abs/2006.15704",
        slot="strategy",
    ),
    Method(
        name="BF16Precision",
        group="weights",
        saves="of 4 bytes a weight: 2 (stochastic), 1 (split), 0 (kahan); of 4 a gradient: 2; half of the activations",
        costs="two fp32 copies of a bucket of parameters in the step; gradients accumulate in bf16",
        numerics="statistical",
        use_when="all parameters train: split beside adamw_split_master holds weights, masters and moments in 5 bytes",
        measured="held-out loss 2.916 (split), 2.912 (stochastic), fp32 2.907, pure bf16 3.197: " + _CURVES,
        init_args={"weights": "split"},
        source="Zamirai et al. 2020, https://arxiv.org/abs/2010.06192; FlashOptim 2026, https://arxiv.org/abs/2602.23349",
        slot="plugins",
    ),
    Method(
        name="FP8Precision",
        group="weights",
        saves="time in large products, and autocast's bf16 copies of linear weights: 2 bytes a weight",
        costs="conversions to fp8; compile the blocks",
        numerics="statistical",
        use_when="large linear layers on a GPU of compute capability 8.9 or later",
        requires=("torchao",),
        source="torchao, https://docs.pytorch.org/ao/stable/workflows/training.html",
        slot="plugins",
    ),
    Method(
        name="AllocatorSettings",
        group="allocator",
        saves="reserved but unused accelerator memory (fragmentation)",
        costs="nothing measurable",
        numerics="exact",
        use_when="always, on an accelerator",
        measured="process peak of LoRA on the CPU under glibc: 2820 -> 2264 MB: " + _BENCH,
    ),
    Method(
        name="MemoryProfiler",
        group="observation",
        saves="nothing: shows the peak by category, module and phase",
        costs="the profiled steps run slower; the others are untouched",
        numerics="exact",
        use_when="to see what to save on",
        measured="1.0 microsecond a step that is not profiled",
    ),
    Method(
        name="MemoryAudit",
        group="observation",
        saves="nothing: checks in the first step that every saver does what it says",
        costs="one step with hooks",
        numerics="exact",
        use_when="always while setting a run up",
    ),
)


def method(name: str) -> Method:
    """Return the catalog row of a public class.

    Example:
        >>> method("QLoRA").class_path
        'lightning_memsave.QLoRA'

    """
    for row in CATALOG:
        if row.name == name:
            return row
    raise KeyError(f"{name!r} is not in the catalog; it has {', '.join(row.name for row in CATALOG)}")
