"""The public surface changes on purpose only."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lightning_memsave

SURFACE = {
    "ActivationCheckpointing": ["modules", "policy", "every_n", "budget"],
    "ActivationOffloading": ["modules", "device", "host_budget", "min_bytes"],
    "AdapterCheckpoint": ["export_peft"],
    "AllocatorSettings": [
        "expandable_segments",
        "empty_cache_after_setup",
        "host_mmap_threshold",
        "host_trim",
        "autocast_cache",
    ],
    "AttentionKernel": ["implementation"],
    "BF16Precision": ["weights", "keep_fp32", "correction", "checkpoint_dtype"],
    "BlockDDPStrategy": [
        "bucket_size",
        "broadcast_buffers",
        "cluster_environment",
        "process_group_backend",
        "timeout",
        "start_method",
        "checkpoint_io",
        "precision_plugin",
        "ddp_only",
    ],
    "CheckpointRehearsal": [],
    "ChunkedLoss": ["chunk_tokens", "backend"],
    "EarlyZeroGrad": [],
    "FP8Precision": ["recipe"],
    "GradientRelease": ["clip", "accumulate"],
    "LengthGroupedSampler": ["lengths", "batch_size", "seed", "drop_last", "num_replicas", "rank"],
    "LoRA": ["rank", "alpha", "dropout", "modules", "variant", "train", "frozen_dtype", "adapter_dtype"],
    "LowMemoryOptimizer": ["name", "options", "keep_32bit"],
    "MemoryAudit": ["strict"],
    "MemoryProfiler": ["steps", "formats", "snapshot"],
    "OptimizerOffload": ["device", "gradients", "master_weights", "when", "host_budget"],
    "PackedDataset": ["dataset", "sequence_length", "strategy", "overlong", "keys", "lengths"],
    "PackingCollator": ["attention", "config", "causal", "pad_token_id", "length"],
    "QLoRA": ["rank", "alpha", "dropout", "modules", "kind", "train", "frozen_dtype"],
    "SavedActivationPrecision": ["modules", "dtype", "min_values"],
    "TiledCompute": ["modules", "tile_tokens"],
    "WeightQuantization": ["kind", "modules", "skip", "double_quant", "compute_dtype"],
    "apply": ["module", "callbacks"],
    "chunked_cross_entropy": [
        "hidden",
        "weight",
        "target",
        "bias",
        "class_weight",
        "ignore_index",
        "reduction",
        "label_smoothing",
        "z_loss",
        "softcap",
        "scale",
        "chunk_tokens",
        "backend",
    ],
    "document_mask": ["document_ids", "form", "causal", "window", "dtype"],
    "last_report": [],
    "load_adapters": ["module", "path"],
    "merge_adapters": ["module", "dtype"],
    "preset": ["name"],
}
OTHERS = {
    "Applied", "AppliedTransforms", "CheckpointMismatchError", "ConfigurationError", "IncompatibleMethodsError",
    "MemoryReport", "MemsaveError", "MissingDependencyError", "ModelTransform", "NothingToTransformError", "PeakMemory",
    "Stage", "__version__",
}  # fmt: skip


def test_the_exported_names_are_exactly_these() -> None:
    assert set(lightning_memsave.__all__) == set(SURFACE) | OTHERS
    assert lightning_memsave.__all__ == [*sorted(n for n in lightning_memsave.__all__ if n[0] != "_"), "__version__"]


def test_the_lazy_table_and_the_typed_imports_agree() -> None:
    tree = ast.parse(Path(lightning_memsave.__file__).read_text())
    typed = {
        alias.asname: node.module.removeprefix("lightning_memsave.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_memsave.")
        for alias in node.names
    }
    assert typed == lightning_memsave._EXPORTS


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_promised_arguments_keep_their_names_and_order(name: str) -> None:
    assert list(inspect.signature(getattr(lightning_memsave, name)).parameters) == SURFACE[name]


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_public_callables_are_documented_and_typed(name: str) -> None:
    value = getattr(lightning_memsave, name)
    doc = inspect.getdoc(value)
    hints = set(inspect.signature(value).parameters.values())
    assert all(p.annotation is not inspect.Parameter.empty for p in hints)
    assert len(doc.splitlines()[0]) < 81
    assert "Example" in doc or not hints
    assert all(f"{p.name}:" in doc for p in hints), "every argument is described"


def test_no_callback_has_the_name_of_one_of_lightnings() -> None:
    import lightning.pytorch.callbacks as theirs

    assert not set(lightning_memsave.__all__) & set(theirs.__all__)


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_memsave.Nothing
