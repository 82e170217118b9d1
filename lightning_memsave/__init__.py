"""Train the same LightningModule in less memory, with callbacks and strategies that need no edit of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_memsave.callbacks._apply import apply as apply
    from lightning_memsave.callbacks.activation_checkpointing import ActivationCheckpointing as ActivationCheckpointing
    from lightning_memsave.callbacks.activation_offloading import ActivationOffloading as ActivationOffloading
    from lightning_memsave.callbacks.adapter_checkpoint import AdapterCheckpoint as AdapterCheckpoint
    from lightning_memsave.callbacks.allocator_settings import AllocatorSettings as AllocatorSettings
    from lightning_memsave.callbacks.attention_kernel import AttentionKernel as AttentionKernel
    from lightning_memsave.callbacks.checkpoint_rehearsal import CheckpointRehearsal as CheckpointRehearsal
    from lightning_memsave.callbacks.chunked_loss import ChunkedLoss as ChunkedLoss
    from lightning_memsave.callbacks.early_zero_grad import EarlyZeroGrad as EarlyZeroGrad
    from lightning_memsave.callbacks.gradient_release import GradientRelease as GradientRelease
    from lightning_memsave.callbacks.lora import LoRA as LoRA
    from lightning_memsave.callbacks.low_memory_optimizer import LowMemoryOptimizer as LowMemoryOptimizer
    from lightning_memsave.callbacks.memory_audit import MemoryAudit as MemoryAudit
    from lightning_memsave.callbacks.memory_profiler import MemoryProfiler as MemoryProfiler
    from lightning_memsave.callbacks.model_transform import ModelTransform as ModelTransform
    from lightning_memsave.callbacks.optimizer_offload import OptimizerOffload as OptimizerOffload
    from lightning_memsave.callbacks.presets import preset as preset
    from lightning_memsave.callbacks.qlora import QLoRA as QLoRA
    from lightning_memsave.callbacks.saved_activation_precision import (
        SavedActivationPrecision as SavedActivationPrecision,
    )
    from lightning_memsave.callbacks.tiled_compute import TiledCompute as TiledCompute
    from lightning_memsave.callbacks.weight_quantization import WeightQuantization as WeightQuantization
    from lightning_memsave.data.collate import PackingCollator as PackingCollator
    from lightning_memsave.data.masks import document_mask as document_mask
    from lightning_memsave.data.packing import PackedDataset as PackedDataset
    from lightning_memsave.data.sampler import LengthGroupedSampler as LengthGroupedSampler
    from lightning_memsave.errors import CheckpointMismatchError as CheckpointMismatchError
    from lightning_memsave.errors import ConfigurationError as ConfigurationError
    from lightning_memsave.errors import IncompatibleMethodsError as IncompatibleMethodsError
    from lightning_memsave.errors import MemsaveError as MemsaveError
    from lightning_memsave.errors import MissingDependencyError as MissingDependencyError
    from lightning_memsave.errors import NothingToTransformError as NothingToTransformError
    from lightning_memsave.memory.peak_metric import PeakMemory as PeakMemory
    from lightning_memsave.memory.report import MemoryReport as MemoryReport
    from lightning_memsave.memory.report import last_report as last_report
    from lightning_memsave.precision.bf16 import BF16Precision as BF16Precision
    from lightning_memsave.precision.fp8 import FP8Precision as FP8Precision
    from lightning_memsave.strategies.block_ddp import BlockDDPStrategy as BlockDDPStrategy
    from lightning_memsave.transforms._adapter_files import load_adapters as load_adapters
    from lightning_memsave.transforms._pass import Applied as Applied
    from lightning_memsave.transforms._pass import AppliedTransforms as AppliedTransforms
    from lightning_memsave.transforms._pass import Stage as Stage
    from lightning_memsave.transforms.chunked_loss import chunked_cross_entropy as chunked_cross_entropy
    from lightning_memsave.transforms.merging import merge_adapters as merge_adapters

__version__ = "0.1.0"

# public name -> the module that defines it. Names are imported at first use, so that importing the package (and every
# command-line verb) starts nothing: no torch, no Lightning, no GPU.
_EXPORTS = {
    "ActivationCheckpointing": "callbacks.activation_checkpointing",
    "ActivationOffloading": "callbacks.activation_offloading",
    "AdapterCheckpoint": "callbacks.adapter_checkpoint",
    "AllocatorSettings": "callbacks.allocator_settings",
    "Applied": "transforms._pass",
    "AppliedTransforms": "transforms._pass",
    "AttentionKernel": "callbacks.attention_kernel",
    "BF16Precision": "precision.bf16",
    "BlockDDPStrategy": "strategies.block_ddp",
    "CheckpointMismatchError": "errors",
    "CheckpointRehearsal": "callbacks.checkpoint_rehearsal",
    "ChunkedLoss": "callbacks.chunked_loss",
    "ConfigurationError": "errors",
    "EarlyZeroGrad": "callbacks.early_zero_grad",
    "FP8Precision": "precision.fp8",
    "GradientRelease": "callbacks.gradient_release",
    "IncompatibleMethodsError": "errors",
    "LengthGroupedSampler": "data.sampler",
    "LoRA": "callbacks.lora",
    "LowMemoryOptimizer": "callbacks.low_memory_optimizer",
    "MemoryAudit": "callbacks.memory_audit",
    "MemoryProfiler": "callbacks.memory_profiler",
    "MemoryReport": "memory.report",
    "MemsaveError": "errors",
    "MissingDependencyError": "errors",
    "ModelTransform": "callbacks.model_transform",
    "NothingToTransformError": "errors",
    "OptimizerOffload": "callbacks.optimizer_offload",
    "PackedDataset": "data.packing",
    "PackingCollator": "data.collate",
    "PeakMemory": "memory.peak_metric",
    "QLoRA": "callbacks.qlora",
    "SavedActivationPrecision": "callbacks.saved_activation_precision",
    "Stage": "transforms._pass",
    "TiledCompute": "callbacks.tiled_compute",
    "WeightQuantization": "callbacks.weight_quantization",
    "apply": "callbacks._apply",
    "chunked_cross_entropy": "transforms.chunked_loss",
    "document_mask": "data.masks",
    "last_report": "memory.report",
    "load_adapters": "transforms._adapter_files",
    "merge_adapters": "transforms.merging",
    "preset": "callbacks.presets",
}

__all__ = [*sorted(_EXPORTS), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
