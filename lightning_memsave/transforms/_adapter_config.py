"""What the adapters in a module are, as the plain data of PEFT's ``adapter_config.json``.

Everything is read off the adapted layers themselves, so it is true however they came there.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["AdaptedLayer", "adapted_layers", "adapter_configs", "adapter_roots", "config_problems"]

_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer, by the settings that decide what it computes."""

    name: str
    adapter: str
    rank: int
    alpha: float
    dropout: float
    scaling: float
    dora: bool
    transposed: bool

    @property
    def rank_stabilized(self) -> bool:
        """Whether the scale is ``alpha / sqrt(rank)`` rather than ``alpha / rank``."""
        return self.rank > 1 and math.isclose(self.scaling, self.alpha / math.sqrt(self.rank))


def adapted_layers(module: nn.Module) -> list[AdaptedLayer]:
    """Return the layers of a module that carry a LoRA adapter, in ``named_modules`` order."""
    found = []
    for name, layer in module.named_modules():
        if not (hasattr(layer, "base_layer") and isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)):
            continue
        for adapter in layer.r:
            dropout = dict(layer.lora_dropout).get(adapter)
            found.append(
                AdaptedLayer(
                    name=name,
                    adapter=adapter,
                    rank=int(layer.r[adapter]),
                    alpha=layer.lora_alpha[adapter],
                    dropout=float(getattr(dropout, "p", 0.0)),
                    scaling=float(layer.scaling[adapter]),
                    dora=adapter in layer.lora_magnitude_vector,
                    transposed=bool(getattr(layer, "fan_in_fan_out", False)),
                )
            )
    return found


def adapter_roots(module: nn.Module) -> dict[str, nn.Module]:
    """Return the models that hold adapters: what PEFT would have wrapped.

    Returns:
        Qualified name -> the outermost Hugging Face model around an adapter, else the child of ``module`` it lies in
        (``module`` itself, named ``""``, if it is no LightningModule or is adapted directly).

    """
    roots: dict[str, nn.Module] = {}
    modules = dict(module.named_modules())
    for layer in adapted_layers(module):
        parts = layer.name.split(".")
        around = [".".join(parts[:i]) for i in range(len(parts))]
        hugging = [n for n in around if _is_hugging_face(modules[n])]
        own = around[1] if len(around) > 1 and _is_lightning(module) else ""
        name = hugging[0] if hugging else own
        roots[name] = modules[name]
    return roots


def _is_hugging_face(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _is_lightning(module: nn.Module) -> bool:
    return any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)


def adapter_configs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return one PEFT configuration per model that holds adapters, as JSON-like data.

    Returns:
        Root name -> configuration; empty for a module without adapters.

    """
    return {name: _config(root) for name, root in adapter_roots(module).items()}


def _config(root: nn.Module) -> dict[str, Any]:
    layers = adapted_layers(root)
    given = getattr(root, "peft_config", {}).get(layers[0].adapter)
    rank, alpha = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0][0]
    init = getattr(given, "init_lora_weights", True)
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if type(root).__name__.endswith(end)), None),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": layers[0].dropout,
        "target_modules": _targets(root, [layer.name for layer in layers]),
        "rank_pattern": {layer.name: layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {layer.name: layer.alpha for layer in layers if layer.alpha != alpha},
        "use_rslora": any(layer.rank_stabilized for layer in layers),
        "use_dora": any(layer.dora for layer in layers),
        "fan_in_fan_out": any(layer.transposed for layer in layers),
        "init_lora_weights": init if isinstance(init, (bool, str)) else True,
        "bias": "none",
    }


def _targets(root: nn.Module, names: list[str]) -> list[str] | str:
    """Return the adapted layers by full name; as one expression where PEFT's suffix match would find others too."""
    plain = [name for name, _ in root.named_modules() if ".base_layer" not in name and ".lora_" not in name]
    over = [n for n in plain if n not in names and any(n.endswith(f".{target}") for target in names)]
    return "|".join(re.escape(name) for name in names) if over else list(names)


def config_problems(saved: Mapping[str, Mapping[str, Any]], module: nn.Module) -> list[str]:
    """Return the settings that change what equal adapter weights compute, where a module's differ from saved ones.

    Args:
        saved: Root name -> PEFT configuration.
        module: The module that carries the adapters.

    """
    found: dict[str, str] = {}
    for name, root in adapter_roots(module).items():
        config = saved.get(name)
        if config is None:
            continue
        for layer in adapted_layers(root):
            if layer.rank != _setting(config, "r", "rank_pattern", layer.name):
                continue  # seen by the shapes
            there = {
                "lora_alpha": _setting(config, "lora_alpha", "alpha_pattern", layer.name),
                "use_rslora": bool(config.get("use_rslora")) and layer.rank > 1,
                "use_dora": bool(config.get("use_dora")),
            }
            here = {"lora_alpha": layer.alpha, "use_rslora": layer.rank_stabilized, "use_dora": layer.dora}
            for key, value in there.items():
                if value != here[key]:
                    found.setdefault(
                        key,
                        f"its adapters were trained with {key}={value!r}, and the module's have {key}={here[key]!r} "
                        f"(first: {layer.name}).",
                    )
    return list(found.values())


def _setting(config: Mapping[str, Any], key: str, patterns: str, name: str) -> Any:
    """Return a layer's rank or alpha as PEFT reads it: the first pattern that ends its name, else the common one."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config.get(key)
