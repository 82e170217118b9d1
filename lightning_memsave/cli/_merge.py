"""Merge adapters into a Hugging Face model on disk."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memsave._imports import require
from lightning_memsave.errors import CheckpointMismatchError, ConfigurationError
from lightning_memsave.transforms._adapter_files import REBASED, load_adapters, read_checkpoint, read_peft
from lightning_memsave.transforms._bnb_layers import quantize_layer
from lightning_memsave.transforms._checkpoint_state import RECORD_KEY
from lightning_memsave.transforms.merging import MergeReport, merge_adapters
from lightning_memsave.transforms.quantization import Quantization, quantize_weights

__all__ = ["MergeRequest", "MergeResult", "merge_files"]

VERB = "memsave merge"
_IN_PYTHON = "Other modules are merged in Python: lightning_memsave.merge_adapters(module)."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "In a distant valley, an old clock began to",
    "Water boils at a lower temperature on a mountain because",
)


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """What to merge, into what, and where to write it."""

    base: str
    adapter: Path
    output: Path
    base_weights: str = "auto"
    quantized_as: str | None = None
    dtype: str | None = None
    prompts: tuple[str, ...] = ()
    max_difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What came out.

    Args:
        output: The folder written, or ``None`` if the difference was larger than allowed.
        base_weights: ``original`` or ``dequantized``: what the adapters were added to.
        trained_on: How the base was stored in training: ``nf4``, ``fp4``, ``int8``, or ``None`` for floating weights.
        num_layers: Layers merged.
        num_quantized: Base weights that were rounded to their quantized values.
        untied: Layers whose weight was shared with another and is their own now.
        max_logit_difference: Largest difference of a logit to the model as trained, unmerged.
        max_logit: Largest magnitude of a logit, to compare the difference with.
        samples: What the logits were computed on.

    """

    output: str | None
    base_weights: str
    trained_on: str | None
    num_layers: int
    num_quantized: int
    untied: tuple[str, ...]
    max_logit_difference: float
    max_logit: float
    samples: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "untied": list(self.untied)}


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """Adapters on disk: PEFT's configuration, and base weight -> how it was stored in training."""

    config: dict[str, Any]
    stored: dict[str, str]


def merge_files(request: MergeRequest) -> MergeResult:
    """Merge, compare and write.

    Raises:
        ConfigurationError: If the output exists, the base is no Hugging Face model, or there is nothing to compare on.
        CheckpointMismatchError: If the adapters are not of this base.

    """
    if request.output.exists():
        raise ConfigurationError(
            f"{str(request.output)!r} exists, and nothing is overwritten. Give another --output, or remove it."
        )
    adapter = _read_adapter(request.adapter)
    if request.quantized_as is not None and adapter.stored:
        raise ConfigurationError(
            f"--quantized-as is for adapters that do not say what they were trained on; these were trained on "
            f"{_common(adapter.stored)}. Leave it out."
        )
    model = _load_model(request)
    tokenizer = _tokenizer(request.base)
    samples, said = _samples(request, model, tokenizer)
    num_quantized, trained_on = _store_as_trained(model, adapter, request.quantized_as)
    chosen = _base_weights(request.base_weights, trained_on)
    _attach(model, adapter, request.adapter)
    expected = _logits(model, samples)
    if trained_on and chosen == "original":
        del model
        model = _load_model(request)
        _attach(model, adapter, request.adapter)
    report = merge_adapters(model, dtype=_DTYPES.get(request.dtype or "", model.dtype))
    _dequantize_rest(model)
    difference = float((_logits(model, samples) - expected).abs().max())
    allowed = request.max_difference is None or difference <= request.max_difference
    if allowed:
        _save(model, tokenizer, request.output, report)
    return MergeResult(
        output=str(request.output) if allowed else None,
        base_weights=chosen,
        trained_on=trained_on,
        num_layers=report.num_layers,
        num_quantized=num_quantized if chosen == "dequantized" else 0,
        untied=report.untied,
        max_logit_difference=difference,
        max_logit=float(expected.abs().max()),
        samples=said,
    )


def _base_weights(asked: str, trained_on: str | None) -> str:
    """Return what to add the adapters to: ``original`` or ``dequantized``."""
    if asked == "auto":
        return "dequantized" if trained_on else "original"
    if asked == "dequantized" and not trained_on:
        raise ConfigurationError(
            "--base-weights dequantized, and the adapters were trained on floating weights (or do not say). "
            "Write --base-weights original, or --quantized-as nf4 if they were trained on a 4-bit base."
        )
    return asked


# -- adapters -----------------------------------------------------------------------------------------------------
def _read_adapter(path: Path) -> _Adapter:
    if not path.exists():
        raise ConfigurationError(f"there is nothing at --adapter {str(path)!r}.")
    if path.is_dir() and not (path / ".metadata").is_file():
        if not (path / "adapter_config.json").is_file():
            raise ConfigurationError(f"{str(path)!r} is no PEFT folder: it has no adapter_config.json.")
        return _Adapter(config=read_peft(path)[0], stored={})
    record = read_checkpoint(path).get(RECORD_KEY)
    if not record or not record["adapters"]:
        raise CheckpointMismatchError(
            f"{str(path)!r} holds no adapters written by LoRA or QLoRA. Give such a checkpoint, or a PEFT folder."
        )
    if len(record["adapters"]) > 1:
        raise CheckpointMismatchError(
            f"{str(path)!r} holds adapters of {len(record['adapters'])} models ({', '.join(record['adapters'])}). "
            "Export them (AdapterCheckpoint(export_peft=True)) and merge one folder at a time."
        )
    ((root, config),) = record["adapters"].items()
    prefix = f"{root}." if root else ""
    kinds = {name: entry["kind"] for name, entry in record["base"].items() if name.startswith(prefix)}
    stored = {
        name[len(prefix) :].replace(".base_layer.", ".").removesuffix(".weight"): kind
        for name, kind in kinds.items()
        if kind.split("-")[0] in ("nf4", "fp4", "int8")
    }
    return _Adapter(config=config, stored=stored)


def _common(stored: dict[str, str]) -> str:
    return next(iter(stored.values())).split("-")[0]


def _attach(model: nn.Module, adapter: _Adapter, path: Path) -> None:
    peft = require("peft", VERB)
    start = adapter.config.get("init_lora_weights")
    if start in REBASED:
        raise CheckpointMismatchError(
            f"the adapters in {str(path)!r} were started with init_lora_weights={start!r}, which changes the weights "
            "they lie on; convert them with PEFT first (save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    known = set(peft.LoraConfig.__dataclass_fields__) - {"auto_mapping", "init_lora_weights", "modules_to_save"}
    config = peft.LoraConfig(**{key: value for key, value in adapter.config.items() if key in known})
    if isinstance(config.target_modules, str):
        config.target_modules = rf"root\.(?:{config.target_modules})"
    # the flags make peft use its layers for quantized weights
    neutral = nn.Module()
    neutral.add_module("root", model)
    neutral.is_loaded_in_4bit = neutral.is_loaded_in_8bit = True  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            peft.inject_adapter_in_model(config, neutral)
    except ValueError as error:
        raise CheckpointMismatchError(f"the adapters in {str(path)!r} are of another model: {error}") from error
    load_adapters(model, path)
    model.eval()


# -- the base -----------------------------------------------------------------------------------------------------
def _load_model(request: MergeRequest) -> Any:
    transformers = require("transformers", VERB)
    if Path(request.base).is_file():
        raise ConfigurationError(
            f"--base {request.base!r} is a file. Give the folder or the hub name of a Hugging Face model, as for "
            f"from_pretrained. {_IN_PYTHON}"
        )
    dtype = "auto" if request.dtype is None else _DTYPES[request.dtype]
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(request.base)
            names = config.architectures or []
            cls = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), transformers.AutoModel)
            model = cls.from_pretrained(request.base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--base {request.base!r} cannot be loaded as a Hugging Face model: {str(error).splitlines()[0]} "
            f"{_IN_PYTHON}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _store_as_trained(model: nn.Module, adapter: _Adapter, quantized_as: str | None) -> tuple[int, str | None]:
    """Quantize the base as it was in training, so that the unmerged model computes what was trained."""
    if quantized_as is not None:
        return quantize_weights(model, Quantization(kind=quantized_as, subject=VERB)).num_modules, quantized_as
    layers = dict(model.named_modules())
    unknown = [name for name in adapter.stored if name not in layers]
    if unknown:
        raise CheckpointMismatchError(
            f"the adapters were trained on another base: it has no layer {unknown[0]} (and {len(unknown) - 1} more)."
        )
    for name, kind in adapter.stored.items():
        parts = kind.split("-")
        quantize_layer(
            layers[name], kind=parts[0], double_quant=parts[-1] == "double", compute_dtype=None, subject=VERB
        )
    return len(adapter.stored), _common(adapter.stored) if adapter.stored else None


def _dequantize_rest(model: nn.Module) -> None:
    """Give quantized layers without an adapter plain weights, in place."""
    from lightning_memsave.transforms._bnb_layers import dequantized_weight
    from lightning_memsave.transforms._selection import linear_kind

    for name, layer in list(model.named_modules()):
        if linear_kind(layer) not in ("4bit", "8bit"):
            continue
        weight = dequantized_weight(layer, model.dtype)  # type: ignore[arg-type]
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


# -- comparing and writing ----------------------------------------------------------------------------------------
def _tokenizer(base: str) -> Any | None:
    """Return the tokenizer beside the model, or ``None``."""
    transformers = require("transformers", VERB)
    try:
        return transformers.AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError, ImportError):  # ImportError: one that needs a library, or in 4.x none at all
        return None


def _samples(request: MergeRequest, model: Any, tokenizer: Any | None) -> tuple[list[Tensor], str]:
    """Return token ids to compare on, and what they are."""
    size = getattr(model.config, "vocab_size", None)
    if not size or "input_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigurationError(
            f"--base {request.base!r} ({type(model).__name__}) reads no token ids, on which the merged model is "
            f"compared with the unmerged one. {_IN_PYTHON}"
        )
    if tokenizer is not None:
        texts = request.prompts or _PROMPTS
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        return [row for row in ids if row.numel()], f"{len(texts)} prompts"
    if request.prompts:
        raise ConfigurationError(
            f"no tokenizer of {request.base!r} can be loaded, so there is no text to compare on. Leave --prompt out "
            "for random tokens."
        )
    generator = torch.Generator().manual_seed(0)
    length = min(32, getattr(model.config, "max_position_embeddings", 32))
    return [torch.randint(0, size, (4, length), generator=generator)], f"4 x {length} random tokens (no tokenizer)"


@torch.no_grad()
def _logits(model: Any, samples: list[Tensor]) -> Tensor:
    """Return all logits (or last hidden states) in one row."""
    rows = []
    for ids in samples:
        decoded = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids, **decoded)
        rows.append((output.logits if hasattr(output, "logits") else output[0]).float().flatten())
    return torch.cat(rows)


def _save(model: Any, tokenizer: Any | None, output: Path, report: MergeReport) -> None:
    """Write everything beside the output, then rename: an interrupted run leaves no half folder of that name."""
    transformers = require("transformers", VERB)
    if report.untied:
        model.config.tie_word_embeddings = False
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _quiet(transformers):
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
