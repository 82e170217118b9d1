"""Run position-wise modules (MLPs, norms) over slices of the sequence, forward and backward.

Only the input of a tiled module is kept for backward; what is between its layers exists for one slice at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_memsave._match import match_modules
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms._pass import Applied
from lightning_memsave.transforms._patch import InstanceForward, patch_forward

__all__ = ["DEFAULT_PATTERNS", "TileCounts", "tile_counts", "tile_modules"]

SUBJECT = "TiledCompute"
DEFAULT_PATTERNS = ("*mlp*", "*norm*")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class TileCounts:
    """What one module did.

    Args:
        calls: Forwards.
        tiled: Forwards that were longer than a tile.
        longest: The most tokens of a forward.
        probed: Whether it was seen to work on every position alone.

    """

    calls: int = 0
    tiled: int = 0
    longest: int = 0
    probed: bool = False


def tile_modules(root: nn.Module, patterns: Sequence[str], *, tile_tokens: int) -> Applied:
    """Run the selected modules over slices of at most ``tile_tokens`` positions, in place.

    Args:
        root: The model.
        patterns: Globs or class names; of nested matches the outermost is taken. With ``DEFAULT_PATTERNS`` one of
            the two has to match, else each.
        tile_tokens: Positions of dimension ``-2`` in a slice.

    Returns:
        What was done, with the way back.

    Raises:
        NothingToTransformError: If nothing is selected.
        ConfigurationError: If a selected module has statistics over the batch; nothing was changed then.

    """
    chosen = _outermost(_select(root, patterns))
    for name, module in chosen:
        mixing = next((n for n, m in module.named_modules() if isinstance(m, _BatchNorm)), None)
        if mixing is not None:
            raise ConfigurationError(
                f"{SUBJECT}: {name!r} holds the batch norm {mixing or name!r}, whose statistics depend on all "
                "positions. Name other modules with modules=[...]."
            )
    undo = [
        patch_forward(module, _tiled_forward, name=name, tile=tile_tokens, counts=TileCounts())
        for name, module in chosen
    ]
    classes = Counter(type(module).__name__ for _, module in chosen)
    what = ", ".join(f"{count} {name}" for name, count in classes.items())

    def undo_all() -> None:
        while undo:
            undo.pop()()

    return Applied(summary=f"run {what} in tiles of {tile_tokens} tokens", num_modules=len(chosen), undo=undo_all)


def tile_counts(root: nn.Module) -> dict[str, TileCounts]:
    """Return the counts of every tiled module below ``root``, by qualified name."""
    found = {}
    for name, module in root.named_modules():
        patch = module.__dict__.get("forward")
        while isinstance(patch, InstanceForward):
            if patch.call is _tiled_forward:
                found[name] = patch.options["counts"]
            patch = patch.inner
    return found


def _select(root: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    if tuple(patterns) == DEFAULT_PATTERNS:
        found = []
        for pattern in patterns:
            try:
                found += match_modules(root, (pattern,), subject=SUBJECT)
            except NothingToTransformError:
                if pattern == patterns[-1] and not found:
                    raise
        names = {name for name, _ in found}
        found = [(name, module) for name, module in root.named_modules() if name in names]
    else:
        found = match_modules(root, patterns, subject=SUBJECT)
    chosen = [(name, module) for name, module in found if not isinstance(module, _CONTAINERS)]
    if not chosen:
        raise NothingToTransformError(
            f"{SUBJECT}: modules={list(patterns)!r} matched only lists of modules, which are never called: "
            f"{', '.join(name for name, _ in found)}. Name the modules in them, e.g. {found[0][0] + '.*'!r}."
        )
    return chosen


def _outermost(chosen: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    kept: list[tuple[str, nn.Module]] = []
    for name, module in chosen:  # named_modules order: parents first
        if not any(name.startswith(f"{parent}.") for parent, _ in kept):
            kept.append((name, module))
    return kept


# -- the forward ------------------------------------------------------------------------------------------------------
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tiled_forward(patch: InstanceForward, *args: Any, **kwargs: Any) -> Any:
    name, tile, counts = patch.options["name"], patch.options["tile"], patch.options["counts"]
    key = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
    x = kwargs.get(key) if key is not None else args[0] if args else None
    counts.calls += 1
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = type(x).__name__ if not isinstance(x, Tensor) else f"a {x.dtype} tensor of shape {tuple(x.shape)}"
        raise ConfigurationError(
            f"{SUBJECT}: {name!r} was called with {found} as its first argument, and tiles are cut from a floating "
            "tensor of shape (..., tokens, features). Name other modules with modules=[...]."
        )
    tokens = x.shape[-2] if x.ndim > 1 else 1
    counts.longest = max(counts.longest, tokens)
    if tokens <= tile:
        return patch.inner(*args, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k != key}
    others = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    if others:
        raise ConfigurationError(
            f"{SUBJECT}: {name!r} was called with {1 + len(others)} tensors, and only one can be cut into tiles. "
            "Name other modules with modules=[...]."
        )
    call = _Call(patch.inner, key, args[1:], kwargs, name)
    if not counts.probed:
        _probe(patch.module, call, x)
        counts.probed = True
    counts.tiled += 1
    if not torch.is_grad_enabled():
        return _run_tiles(call, x, tile)
    trained = list({id(p): p for p in patch.module.parameters() if p.requires_grad}.values())
    return _Tiled.apply(call, tile, x, *trained)  # type: ignore[no-untyped-call]


class _Call:
    """The module's own forward with everything but the tile bound."""

    def __init__(
        self, forward: Callable[..., Any], key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> None:
        self.forward, self.key, self.args, self.kwargs, self.name = forward, key, args, kwargs, name

    def __call__(self, tile: Tensor) -> Tensor:
        if self.key is None:
            out = self.forward(tile, *self.args, **self.kwargs)
        else:
            out = self.forward(**{self.key: tile}, **self.kwargs)
        if not isinstance(out, Tensor) or out.shape[:-1] != tile.shape[:-1]:
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ConfigurationError(
                f"{SUBJECT}: {self.name!r} returned {found} for an input of shape {tuple(tile.shape)}; one tensor with "
                "the same positions is needed to put tiles together. Name other modules with modules=[...]."
            )
        return out


def _run_tiles(call: _Call, x: Tensor, tile: int) -> Tensor:
    out: Tensor | None = None
    for start in range(0, x.shape[-2], tile):
        piece = call(x.narrow(-2, start, min(tile, x.shape[-2] - start)))
        if out is None:
            out = piece.new_empty((*x.shape[:-1], piece.shape[-1]))
        out.narrow(-2, start, piece.shape[-2]).copy_(piece)
        del piece
    assert out is not None
    return out


def _probe(module: nn.Module, call: _Call, x: Tensor) -> None:
    """Compare a short input as a whole with its two halves: a module that mixes positions gives something else."""
    short = x.detach().narrow(-2, 0, min(8, x.shape[-2]))
    half = short.shape[-2] // 2
    training = [m for m in module.modules() if m.training]
    with torch.no_grad(), _same_random(short):
        for m in training:
            m.training = False  # dropout draws other values for other shapes
        try:
            whole = call(short).float()
            halves = _run_tiles(call, short, max(1, half)).float()
        finally:
            for m in training:
                m.training = True
    worst = (whole - halves).abs().max()
    size = whole.abs().max()
    allowed = 0.05 if x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type) else 1e-3
    if bool(worst > allowed * size + 1e-12):
        raise ConfigurationError(
            f"{SUBJECT}: {call.name!r} mixes positions: run on {short.shape[-2]} positions at once and on "
            f"{max(1, half)} at a time it differs by {float(worst):.3g} (largest value {float(size):.3g}). Tiles would "
            "change what it computes. Name other modules with modules=[...]."
        )


# -- backward ---------------------------------------------------------------------------------------------------------
class _Tiled(torch.autograd.Function):
    """Keeps the input; recomputes one tile at a time in backward.

    Parameter gradients go back through autograd as one tensor each, so that DDP, FSDP2, tensor parallelism and
    hooks on gradients see what they see of an untiled module.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, tile: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call, ctx.tile, ctx.replay = call, tile, _Replay(x)
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return _run_tiles(call, x, tile)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        wants_x = ctx.needs_input_grad[2]
        if torch.is_grad_enabled():  # create_graph=True: nothing can be freed, the gradients are differentiated again
            with ctx.replay.replayed():
                out = torch.cat([ctx.call(piece) for piece in x.split(ctx.tile, dim=-2)], dim=-2)
            wanted = [*([x] if wants_x else []), *parameters]
            again = list(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
            return (None, None, again.pop(0) if wants_x else None, *again)
        grad_x = torch.empty_like(x) if wants_x else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with ctx.replay.replayed(), torch.enable_grad():
            for start in range(0, x.shape[-2], ctx.tile):
                length = min(ctx.tile, x.shape[-2] - start)
                piece = x.detach().narrow(-2, start, length).requires_grad_(wants_x)
                out = ctx.call(piece)
                inputs = [*([piece] if wants_x else []), *parameters]
                found: list[Tensor | None] = list(
                    torch.autograd.grad(out, inputs, grad.narrow(-2, start, length), allow_unused=True)
                )
                if grad_x is not None:
                    first = found.pop(0)
                    target = grad_x.narrow(-2, start, length)
                    target.zero_() if first is None else target.copy_(first)
                _add(sums, found)
                del out, piece, found
        totals = (s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters))
        return (None, None, grad_x, *totals)


def _add(sums: list[Tensor | None], found: list[Tensor | None]) -> None:
    """Add up in fp32 what is half: many small tiles would be rounded away."""
    for i, grad in enumerate(found):
        if grad is None:
            continue
        if sums[i] is None:
            half = grad.dtype in (torch.bfloat16, torch.float16)
            sums[i] = grad.float() if half else grad
        else:
            sums[i].add_(grad)  # type: ignore[union-attr]


class _Replay:
    """The random state and autocast a forward ran under, for its recompute."""

    def __init__(self, x: Tensor) -> None:
        self._device = x.device.type
        self._cpu_state = torch.get_rng_state()
        self._device_states = get_device_states(x) if self._device not in ("cpu", "meta") else None
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in dict.fromkeys((self._device, "cpu"))
            if device != "meta"
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run what is inside as the forward ran, and leave the random state as it was."""
        with ExitStack() as stack:
            devices = list(self._device_states[0]) if self._device_states else []
            stack.enter_context(_forked(devices, self._device))
            torch.set_rng_state(self._cpu_state)
            if self._device_states:
                set_device_states(*self._device_states, device_type=self._device)
            for device, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield


def _forked(devices: list[int], device_type: str) -> AbstractContextManager[Any]:
    return torch.random.fork_rng(devices, device_type=device_type if device_type not in ("cpu", "meta") else "cuda")


@contextmanager
def _same_random(x: Tensor) -> Iterator[None]:
    devices = [x.device.index or 0] if x.device.type not in ("cpu", "meta") else []
    with _forked(devices, x.device.type):
        yield
