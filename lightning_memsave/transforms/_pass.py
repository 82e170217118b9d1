"""One ordered pass over a model: every method that changes a module goes through here.

The package decides the order (``Stage``), not the user's list. A pass runs once, touches nothing before
all conflicts are known, and can be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from torch import nn

from lightning_memsave.errors import ConfigurationError

__all__ = ["Applied", "AppliedTransforms", "Stage", "Transform", "TransformPass", "applied_record"]

_RECORD = "_memsave_applied"


class Stage(IntEnum):
    """When a transform runs, lowest first; the gaps leave room for a user's own."""

    KERNEL = 10
    QUANTIZE = 20
    ADAPT = 30
    TENSOR_PARALLEL = 40
    CHECKPOINT = 50
    OFFLOAD = 60
    COMPILE = 70
    SHARD = 80


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What one transform did to a model.

    Args:
        summary: What changed, for people, e.g. ``"recompute 30 LlamaDecoderLayer in backward"``.
        num_modules: How many modules were changed; never zero (a transform that matches nothing raises).
        bytes_before: Bytes held by what was changed, before; zero where the method changes no resident bytes.
        bytes_after: The same bytes after the change.
        undo: Puts the model back. ``None`` only where nothing is left to put back.
        persistent: The change outlives the run (adapters, quantized weights): it is not undone at teardown, and
            a later run on the same module does not apply it again.

    """

    summary: str
    num_modules: int
    bytes_before: int = 0
    bytes_after: int = 0
    undo: Callable[[], None] | None = None
    persistent: bool = False


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A named change of a model, with its place in the order.

    Args:
        name: The public class, e.g. ``"LoRA"``.
        stage: A ``Stage``, or an int between two of them.
        function: Changes the module in place and says what it did.
        config: The settings as text; two transforms of one name and one config are the same transform.
        repeatable: Several with different settings may stand side by side (other modules, same method).

    """

    name: str
    stage: int
    function: Callable[[nn.Module], Applied]
    config: str = ""
    repeatable: bool = False


@dataclass
class AppliedTransforms:
    """The transforms that were applied to one module, in order, and the way back.

    Args:
        module: The module that was changed.
        entries: ``(transform, what it did)`` pairs in the order in which they ran.

    """

    module: nn.Module
    entries: list[tuple[Transform, Applied]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Transform, Applied]]:
        """Iterate over ``(transform, what it did)``."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return how many transforms were applied."""
        return len(self.entries)

    def undo(self, *, persistent: bool = True) -> None:
        """Put the module back, last change first; a second call does nothing.

        Args:
            persistent: Also take back adapters and quantized weights. Dequantized weights are the quantized values:
                what quantization rounded away is lost.

        """
        kept = []
        while self.entries:
            transform, applied = self.entries.pop()
            if applied.persistent and not persistent:
                kept.append((transform, applied))
                continue
            if applied.undo is not None:
                applied.undo()
            if applied.persistent:
                record = applied_record(self.module)
                record.remove({"name": transform.name, "config": transform.config})
                if not record:
                    del self.module.__dict__[_RECORD]
        self.entries.extend(reversed(kept))


def applied_record(module: nn.Module) -> list[dict[str, str]]:
    """Return the list of persistent transforms a module carries; plain data, so that it copies and pickles."""
    record: list[dict[str, str]] = module.__dict__.setdefault(_RECORD, [])
    return record


class TransformPass:
    """Collect transforms, then apply them once in the order of their stages."""

    def __init__(self) -> None:
        self._transforms: list[Transform] = []

    @property
    def transforms(self) -> list[Transform]:
        """The transforms in the order in which they will run."""
        return sorted(self._transforms, key=lambda t: (int(t.stage), t.name, t.config))

    def add(self, transform: Transform) -> bool:
        """Add one transform; the same one twice is one.

        Returns:
            False if the same transform (name and settings) is already there.

        Raises:
            ConfigurationError: If another of that name with other settings is there and it is not repeatable.

        """
        for other in self._transforms:
            if other.name != transform.name:
                continue
            if other.config == transform.config:
                return False
            if not transform.repeatable:
                raise ConfigurationError(
                    f"{transform.name}: asked for twice with different settings, {other.config} and "
                    f"{transform.config}. Keep one of them."
                )
        self._transforms.append(transform)
        return True

    def run(self, module: nn.Module) -> AppliedTransforms:
        """Apply everything that the module does not carry yet, in place.

        Either all transforms are applied or, if one raises, none is left behind.

        Raises:
            ConfigurationError: If the module carries a persistent transform of the same name with other settings.

        """
        todo = [t for t in self.transforms if not _carried(module, t)]
        done = AppliedTransforms(module)
        try:
            for transform in todo:
                applied = transform.function(module)
                done.entries.append((transform, applied))
                if applied.persistent:
                    applied_record(module).append({"name": transform.name, "config": transform.config})
        except BaseException:
            done.undo()
            raise
        return done


def _carried(module: nn.Module, transform: Transform) -> bool:
    entries: Sequence[dict[str, str]] = module.__dict__.get(_RECORD, ())
    configs = [entry["config"] for entry in entries if entry["name"] == transform.name]
    if configs and transform.config not in configs and not transform.repeatable:
        raise ConfigurationError(
            f"{transform.name}: the module already carries {configs[0]} from an earlier run, and {transform.config} "
            "was asked for. Use the earlier settings, or start from a fresh module."
        )
    return transform.config in configs
