"""Settings of the caching allocator, the host heap and autocast's cache of casts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_memsave.callbacks._saver import Saver
from lightning_memsave.callbacks._session import Session, hook_instance
from lightning_memsave.errors import ConfigurationError, raise_problems
from lightning_memsave.memory.allocator import (
    empty_cache,
    mmap_threshold_problems,
    restore_configuration,
    set_expandable_segments,
    set_mmap_threshold,
)
from lightning_memsave.memory.heap_trim import HeapTrimmer
from lightning_memsave.memory.host import host_allocator
from lightning_memsave.transforms._autocast_cache import AutocastCache
from lightning_memsave.units import GIB, MIB, format_bytes, parse_size

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["AllocatorSettings"]

_NAME = "AllocatorSettings"


class AllocatorSettings(Saver):
    """Set the allocators so that they hold less memory that nobody uses.

    **Saves** reserved but unused accelerator memory: with expandable segments the allocator reserves 0 to 0.8 % more
    than is allocated instead of 1 to 13 %, in simulated runs of 8 to 70 billion parameters.
    ``host_mmap_threshold="16MiB"`` took 342 of 2551 MB from the resident memory of a CPU fine-tune.
    Trimming at 1 GiB took 9 to 27 % from the process peak of four CPU fine-tunes under glibc.
    **Costs** nothing measurable on an accelerator; trimming at 1 GiB 0 to 6 % of the time on the CPU; a host threshold
    below 16 MiB costs time too (4 % at 4 MiB).
    **Numerics** are bitwise equal, except that with ``autocast_cache`` the gradients of several uses of a weight are
    added in 16 bits, as in autocast outside of Lightning.
    **Does not combine with** nothing known; a setting the user made in PYTORCH_ALLOC_CONF stays.

    Args:
        expandable_segments: Let CUDA's caching allocator grow its segments. Takes effect for memory that is reserved
            from then on, so memory must not be reserved before the Trainer starts; the report says so if it is.
        empty_cache_after_setup: Give cached memory back once the model is built, quantized and moved.
        host_mmap_threshold: Size from which glibc returns a freed host block at once, e.g. ``"16MiB"``; ``None`` leaves
            the heap alone. It stays set until the process ends.
        host_trim: Growth of the process, e.g. ``"128MiB"``, at which a thread gives freed host memory back to the
            system (glibc, tcmalloc, jemalloc, mimalloc); ``None`` never does. It counts where tensors live on the host:
            CPU training, offloading, loading. ``"auto"`` is 1 GiB for training on the CPU with glibc's heap, which
            keeps what was freed between used blocks, and nothing elsewhere.
        autocast_cache: Whether autocast keeps its 16-bit copies of the weights until the forward is over. ``None``
            leaves what Lightning does (2.6 keeps none, so a module called several times holds as many copies),
            ``"auto"`` keeps them if the first step calls a module more than once and nothing is recomputed.

    Raises:
        ConfigurationError: At construction, if a size or a policy is none; at ``fit``, if ``autocast_cache`` is set and
            the precision does not use autocast.

    Example:
        >>> from lightning_memsave import AllocatorSettings
        >>> callback = AllocatorSettings(host_mmap_threshold="16MiB")

    Source:
        https://docs.pytorch.org/docs/stable/notes/cuda.html, "Optimizing memory usage"; mallopt(3).

    """

    def __init__(
        self,
        *,
        expandable_segments: bool = True,
        empty_cache_after_setup: bool = True,
        host_mmap_threshold: int | str | None = None,
        host_trim: int | str | None = "auto",
        autocast_cache: Literal["auto", "on", "off"] | None = None,
    ) -> None:
        problems = []
        if host_mmap_threshold is not None:
            try:
                problems += mmap_threshold_problems(parse_size(host_mmap_threshold))
            except ConfigurationError as error:
                problems.append(f"host_mmap_threshold: {error}")
        if host_trim not in (None, "auto"):
            try:
                if parse_size(host_trim) < MIB:
                    problems.append(f'host_trim={host_trim!r} is below 1 MiB. Write "128MiB" or "256MiB".')
            except ConfigurationError as error:
                problems.append(f"host_trim: {error}")
        if autocast_cache not in (None, "auto", "on", "off"):
            problems.append(f'autocast_cache={autocast_cache!r} is not a policy. Write None, "auto", "on" or "off".')
        raise_problems(_NAME, problems)
        self.expandable_segments = expandable_segments
        self.empty_cache_after_setup = empty_cache_after_setup
        self.host_mmap_threshold = host_mmap_threshold
        self.host_trim = host_trim
        self.autocast_cache = autocast_cache

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the allocators, before the model is moved to the device."""
        super().setup(trainer, pl_module, stage)
        session = Session.of(trainer)
        if self.expandable_segments:
            session.shared(_NAME, lambda: _Segments(session))
        if self.host_mmap_threshold is not None:
            session.report(_NAME, set_mmap_threshold(parse_size(self.host_mmap_threshold)))
        growth = self._growth(trainer, stage)
        if growth:
            session.shared("host_trim", lambda: _Trim(session, growth))

    def _growth(self, trainer: Trainer, stage: str) -> int:
        """Return the growth at which to trim, or zero."""
        if self.host_trim == "auto":
            on_host = stage == "fit" and trainer.strategy.root_device.type == "cpu"
            return GIB if on_host and host_allocator() == "glibc" else 0
        return 0 if self.host_trim is None else parse_size(self.host_trim)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the cache of what setup left, and set autocast's cache."""
        session = Session.of(trainer)
        if self.empty_cache_after_setup:
            freed = empty_cache(trainer.strategy.root_device)
            if freed:
                session.report(_NAME, f"{format_bytes(freed)} of cached memory given back after setup")
        if self.autocast_cache is not None:
            policy = "off" if self.autocast_cache == "auto" and "ActivationCheckpointing" in session.methods else None
            session.shared("autocast_cache", lambda: _Autocast(session, pl_module, policy or self.autocast_cache))


class _Segments:
    """Expandable segments for the time of a run."""

    def __init__(self, session: Session) -> None:
        done, self.before = set_expandable_segments(session.trainer.strategy.root_device)
        session.report(_NAME, done)

    def close(self) -> None:
        """Go back to the configuration before the run; a second call does nothing."""
        if self.before is not None:
            restore_configuration(self.before)
            self.before = None


class _Trim(HeapTrimmer):
    """The trimming of a run."""

    def __init__(self, session: Session, growth_bytes: int) -> None:
        super().__init__(growth_bytes)
        session.report(_NAME, self.start())


class _Autocast:
    """The policy for autocast's cache, on the Trainer's precision plugin."""

    def __init__(self, session: Session, module: Any, policy: Any) -> None:
        precision: Any = session.trainer.precision_plugin
        if not hasattr(precision, "autocast_context_manager"):
            raise ConfigurationError(
                f"{_NAME}: autocast_cache is for precision='bf16-mixed' or '16-mixed', and the Trainer has "
                f"precision={precision.precision!r}, which makes no casts. Drop autocast_cache."
            )
        self.cache = AutocastCache(policy, module, lambda how: session.report(_NAME, how))
        self._undo = hook_instance(
            precision, "autocast_context_manager", lambda inner, *args: self.cache.around(inner(*args))
        )

    def close(self) -> None:
        """Leave the plugin as it was; a second call does nothing."""
        self.cache.close()
        self._undo()
