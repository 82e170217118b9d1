"""The table of module kinds, and how a module of a kind is built: its namespace, and where its network is made."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from . import hf_tasks, manual_tasks, tasks


@dataclass(frozen=True)
class Kind:
    """One kind of module.

    Args:
        task: Its class, without a Lightning base.
        batches: Makes its DataLoader.
        blocks: ``modules`` for methods that act on repeated blocks.
        layers: ``modules`` for methods that act on single layers; those of the blocks by default.
        trainer: Trainer arguments this kind is trained with.

    """

    task: type[tasks.Task]
    batches: Callable[[], Any]
    blocks: tuple[str, ...]
    layers: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "language": Kind(tasks.Language, tasks.token_batches, ("net.blocks.*",), trainer={"accumulate_grad_batches": 2}),
    "tied": Kind(tasks.TiedLanguage, tasks.token_batches, ("Block",)),
    "dropout": Kind(tasks.DropoutLanguage, tasks.token_batches, ("Block",), trainer={"gradient_clip_val": 0.5}),
    "layer_wise": Kind(tasks.LayerWise, tasks.token_batches, ("Block",)),
    "stateless": Kind(tasks.Stateless, tasks.token_batches, ("Block",)),
    "tabular": Kind(tasks.Tabular, tasks.tabular_batches, ("layers.?",)),
    "forecasting": Kind(tasks.Forecasting, tasks.forecasting_batches, ("mixers.?",)),
    "vision": Kind(tasks.Vision, tasks.image_batches, ("ConvBlock",), ("Conv2d",)),
    "autoencoder": Kind(tasks.Autoencoder, tasks.vector_batches, ("encoder.?", "decoder.?")),
    "diffusion": Kind(tasks.Diffusion, tasks.vector_batches, ("NoisyBlock",)),
    "graph": Kind(tasks.GraphNetwork, tasks.graph_batches, ("Messages",)),
    "mapping": Kind(tasks.MappingBatch, tasks.mapping_batches, ("encoder.?", "decoder.?")),
    "line_search": Kind(tasks.LineSearch, tasks.vector_batches, ("encoder.?", "decoder.?")),
    "physics": Kind(tasks.Physics, tasks.vector_batches, ("layers.?",)),
    "manual": Kind(manual_tasks.Manual, tasks.vector_batches, ("left.?", "right.?")),
    "gan": Kind(manual_tasks.GAN, tasks.vector_batches, ("generator.?", "critic.0"), ("generator.0", "critic.0")),
    "retain_graph": Kind(manual_tasks.RetainGraph, tasks.vector_batches, ("left.?", "right.?")),
    "several_steps": Kind(manual_tasks.SeveralSteps, tasks.vector_batches, ("left.?", "right.?")),
    "hf_llama": Kind(hf_tasks.HfLlama, tasks.token_batches, ("LlamaDecoderLayer",)),
    "hf_bert": Kind(hf_tasks.HfBert, hf_tasks.classification_batches, ("BertLayer",)),
}


def _in_setup(self: Any, stage: str) -> None:
    if not self.made:
        self.made = True
        tasks.Task.make(self)


def _in_configure_model(self: Any) -> None:
    if not self.made:
        self.made = True
        tasks.Task.make(self)


def _doubled_in_setup(self: Any, stage: str) -> None:
    if not hasattr(self, "ensemble"):
        self.ensemble = copy.deepcopy(nn.ModuleDict(dict(self.named_children())))


def _later(self: Any) -> None:
    self.made = False


PLACES: dict[str, dict[str, Any]] = {
    "init": {},
    "setup": {"make": _later, "setup": _in_setup},
    "configure_model": {"make": _later, "configure_model": _in_configure_model},
    "doubled": {"setup": _doubled_in_setup},
}


@cache
def task_class(kind: str, namespace: str = "lightning.pytorch", place: str = "init") -> type:
    """Return the LightningModule class of a kind: its namespace, and where its network is made."""
    base = importlib.import_module(namespace).LightningModule
    task = KINDS[kind].task
    return type(f"{task.__name__}Module", (task, base), dict(PLACES[place]))


def build(kind: str, namespace: str = "lightning.pytorch", place: str = "init") -> Any:
    """Return a fresh module of a kind, the same weights every time."""
    return task_class(kind, namespace, place)()
