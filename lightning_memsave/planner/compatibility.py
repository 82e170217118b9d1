"""Which methods work together, and on which strategy: one table that everybody reads.

The runtime check, ``memsave doctor``, the docs and the contract tests all read this table. A pair that is not listed
works; a cell is one of ``yes``, ``partly``, ``no`` and ``untested``. What is refused is refused before the model is
touched, and every cell but the untested ones has a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning_memsave.errors import IncompatibleMethodsError

__all__ = [
    "METHOD_CONDITIONS",
    "METHOD_PAIRS",
    "METHOD_STRATEGIES",
    "SHARDED_STRATEGIES",
    "STRATEGIES",
    "UNTESTED_STRATEGIES",
    "Cell",
    "cell",
    "check_methods",
    "pair_problem",
    "partners_refused",
]

Cell = Literal["yes", "partly", "no", "untested"]

STRATEGIES = ("single", "ddp", "ddp_spawn", "memsave_ddp", "fsdp1", "fsdp2", "deepspeed")
# Weights are DTensors, of which a rank holds its shards, and checkpoints are Lightning's ModelParallelStrategy's.
SHARDED_STRATEGIES = ("fsdp2", "memsave_fsdp2", "memsave_tensor_parallel")
# Need a GPU in every version of Lightning that is supported: nothing is claimed of them, and a run says so.
UNTESTED_STRATEGIES = ("fsdp1", "deepspeed")

# two methods -> why they cannot run together and what to write instead
METHOD_PAIRS: dict[frozenset[str], str] = {
    frozenset({"SavedActivationPrecision", "ActivationCheckpointing"}): (
        "recomputed blocks keep little but their inputs, and rounded inputs would change the forward that is repeated. "
        "Keep one of the two."
    ),
    frozenset({"SavedActivationPrecision", "ActivationOffloading"}): (
        "what is offloaded takes no memory on the accelerator. Keep one of the two."
    ),
    frozenset({"QLoRA", "LoRA"}): "QLoRA already adds adapters. Keep QLoRA(rank=...) and drop LoRA.",
    frozenset({"QLoRA", "WeightQuantization"}): (
        "QLoRA already quantizes the weights. Keep QLoRA(kind=...), or use WeightQuantization together with LoRA."
    ),
    frozenset({"BF16Precision", "OptimizerOffload"}): (
        "OptimizerOffload keeps fp32 master weights of 16-bit parameters on the host itself. "
        'Write Trainer(precision="bf16-true") beside it, or drop OptimizerOffload.'
    ),
}

# (method, strategy) -> why it is refused and what to write instead
_ONE_DTYPE = (
    "FSDP1 flattens the parameters of a block into one tensor of one dtype, and packed weights are bytes. "
    'Use strategy="ddp".'
)
_PACKED_ZERO = 'DeepSpeed partitions and casts what it takes for floating weights. Use strategy="ddp".'
_BUCKETS = (
    "DDP averages gradients in buckets that hold a full set of them, whatever is released. "
    'Use strategy="memsave_ddp", which reduces block by block, or ModelParallelStrategy (FSDP2).'
)
_SHARDED_MASTERS = (
    "FSDP shards the weights, and what is kept of their fp32 values at the cast is not sharded with them. "
    'Use FSDP with fp32 parameters (Trainer(precision="bf16-mixed")), or strategy="ddp".'
)
METHOD_STRATEGIES: dict[tuple[str, str], str] = {
    ("WeightQuantization", "fsdp1"): _ONE_DTYPE,
    ("QLoRA", "fsdp1"): _ONE_DTYPE,
    ("LoRA", "fsdp1"): (
        "FSDP1 keeps gradients for the frozen weights that share a flat tensor with an adapter, so nothing is saved. "
        'Use strategy="ddp".'
    ),
    ("AdapterCheckpoint", "fsdp1"): (
        "FSDP1 gathers and writes whole flat tensors, frozen weights included. "
        'Drop AdapterCheckpoint, or use strategy="ddp".'
    ),
    ("GradientRelease", "ddp"): _BUCKETS,
    ("GradientRelease", "ddp_spawn"): _BUCKETS,
    ("GradientRelease", "fsdp1"): (
        "FSDP1 keeps the gradients of a block in one flat tensor of its own until backward has ended. "
        "Use ModelParallelStrategy (FSDP2)."
    ),
    ("GradientRelease", "deepspeed"): (
        "DeepSpeed holds and reduces gradients itself, and steps in its own engine. Drop GradientRelease."
    ),
    ("OptimizerOffload", "fsdp1"): (
        "FSDP1 steps and saves flat tensors of its own. "
        "Use FSDP2 with CPUOffloadPolicy, or FSDPStrategy(cpu_offload=True)."
    ),
    ("OptimizerOffload", "deepspeed"): (
        "DeepSpeed steps in its own engine. Use DeepSpeedStrategy(offload_optimizer=True)."
    ),
    ("BF16Precision", "fsdp1"): _SHARDED_MASTERS,
    ("BF16Precision", "fsdp2"): _SHARDED_MASTERS,
    ("BF16Precision", "deepspeed"): (
        'DeepSpeed keeps fp32 master weights in its own engine. Write Trainer(precision="bf16-true") beside it.'
    ),
    ("FP8Precision", "fsdp1"): (
        'FSDP1 takes no precision plugin but its own. Use strategy="ddp", or ModelParallelStrategy (FSDP2).'
    ),
    ("FP8Precision", "deepspeed"): (
        'DeepSpeed takes no precision plugin but its own. Use strategy="ddp", or ModelParallelStrategy (FSDP2).'
    ),
    ("WeightQuantization", "deepspeed"): _PACKED_ZERO,
    ("QLoRA", "deepspeed"): _PACKED_ZERO,
    ("AdapterCheckpoint", "deepspeed"): (
        "DeepSpeed writes its own checkpoints. "
        "Drop AdapterCheckpoint and pass DeepSpeedStrategy(exclude_frozen_parameters=True)."
    ),
}

# (method, strategy) -> the condition under which it runs
_WHOLE_WEIGHTS = (
    "needs whole weights: where configure_model calls fully_shard itself, call lightning_memsave.apply(self, [...]) "
    "before it, or the run is refused"
)
_STAYS_IN_WORKER = (
    "what was trained stays in the worker process: load it from a checkpoint (load_adapters), or the run is refused "
    "where none is written"
)
METHOD_CONDITIONS: dict[tuple[str, str], str] = {
    ("WeightQuantization", "ddp_spawn"): _STAYS_IN_WORKER,
    ("LoRA", "ddp_spawn"): _STAYS_IN_WORKER,
    ("QLoRA", "ddp_spawn"): _STAYS_IN_WORKER,
    ("LowMemoryOptimizer", "fsdp2"): (
        "the names of bitsandbytes step on the shards of each rank; those that step on whole tensors (adafactor) are "
        "refused: use adamw_8bit or torch.optim.AdamW"
    ),
    ("OptimizerOffload", "fsdp2"): (
        "when='evaluation' only: for the step, FSDP2 keeps shards, gradients and state on the host itself "
        "(fully_shard(..., offload_policy=CPUOffloadPolicy()))"
    ),
    ("WeightQuantization", "fsdp2"): _WHOLE_WEIGHTS,
    ("LoRA", "fsdp2"): _WHOLE_WEIGHTS,
    ("QLoRA", "fsdp2"): _WHOLE_WEIGHTS,
}


def cell(method: str, strategy: str) -> tuple[Cell, str]:
    """Return one cell of method x strategy with its reason or condition.

    Example:
        >>> cell("ActivationCheckpointing", "ddp")
        ('yes', '')
        >>> cell("EarlyZeroGrad", "deepspeed")[0]
        'untested'

    """
    key = (method, strategy)
    if key in METHOD_STRATEGIES:
        return "no", METHOD_STRATEGIES[key]
    if strategy in UNTESTED_STRATEGIES or strategy not in STRATEGIES:
        return "untested", "nothing is known to be wrong, and nothing was tried"
    if key in METHOD_CONDITIONS:
        return "partly", METHOD_CONDITIONS[key]
    return "yes", ""


def pair_problem(first: str, second: str) -> str | None:
    """Return why two methods cannot run together, or ``None`` where they can.

    Example:
        >>> pair_problem("ActivationCheckpointing", "QLoRA") is None
        True

    """
    return METHOD_PAIRS.get(frozenset({first, second}))


def partners_refused(method: str) -> dict[str, str]:
    """Return the methods that cannot run beside one, with the reason.

    Example:
        >>> list(partners_refused("WeightQuantization"))
        ['QLoRA']

    """
    return {next(iter(pair - {method})): reason for pair, reason in METHOD_PAIRS.items() if method in pair}


def check_methods(methods: Mapping[str, Any] | Iterable[str], strategy: str) -> None:
    """Refuse methods that cannot run together, or not on this strategy, listing every problem.

    Args:
        methods: Names of the public classes in use.
        strategy: One of ``STRATEGIES``, or ``"other"`` for a strategy this package does not know.

    Raises:
        IncompatibleMethodsError: If the table refuses a pair or a cell.

    Example:
        >>> check_methods(["ActivationCheckpointing", "QLoRA"], "ddp")

    """
    names = set(methods)
    problems = [
        f"{' and '.join(sorted(pair))} do not combine: {reason}"
        for pair, reason in METHOD_PAIRS.items()
        if pair <= names
    ]
    problems += [
        f"{method} does not run on the {kind!r} strategy: {reason}"
        for (method, kind), reason in METHOD_STRATEGIES.items()
        if kind == strategy and method in names
    ]
    if problems:
        raise IncompatibleMethodsError("\n".join(problems))
