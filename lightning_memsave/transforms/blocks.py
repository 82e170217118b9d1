"""Find the repeated blocks of a model: the layers of a transformer, the residual blocks of a ResNet.

The search knows no model family. It looks for siblings (children of a container, or attributes that differ by a
number) of one class, and decides by structure and parameter counts how deep to go.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_memsave._match import match_modules
from lightning_memsave.errors import NothingToTransformError

__all__ = ["Block", "find_blocks", "is_callable", "select_blocks"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NUMBER = re.compile(r"\d+")
# What a block holds in numbers but is not made of: mixture experts and attention heads run in parallel, inside a block.
_PARALLEL = re.compile(r"experts|heads$", re.IGNORECASE)
# An inner repetition is the real one if it holds at least this share of the outer block's parameters.
_COVERS = 0.5


@dataclass(frozen=True)
class Block:
    """One repeated block.

    Args:
        name: Qualified name.
        module: The module itself.
        group: Qualified name of what the block repeats in; encoder and decoder layers are two groups.

    """

    name: str
    module: nn.Module
    group: str


def find_blocks(root: nn.Module) -> list[Block]:
    """Return the repeated blocks of a model in ``named_modules`` order, none inside another.

    Args:
        root: Any module; only its structure is read, so it may be on the meta device.

    Returns:
        The blocks; empty if nothing in the model repeats.

    Example:
        >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        >>> [block.name for block in find_blocks(model)]
        ['0', '1', '2']

    """
    sure: dict[int, str] = {}
    fallback: dict[int, str] = {}
    for choice in _search(root, ""):
        (sure if choice.sure else fallback)[id(choice.module)] = choice.group
    if not sure and not fallback:
        sure = {id(module): group for module, group in _single(root)}
    # What repeats in one place is a block wherever else it stands: a stage of one block, a layer outside the list.
    classes = {type(module) for module in root.modules() if id(module) in sure}
    settled = {cls for cls in classes if not cls.__module__.startswith("torch.nn.")}

    def walk(module: nn.Module, name: str) -> Iterator[Block]:
        group = name.rpartition(".")[0]
        if name and (id(module) in sure or type(module) in settled):
            yield Block(name, module, sure.get(id(module), group))
            return
        inner = [block for key, child in module.named_children() for block in walk(child, f"{name}.{key}".lstrip("."))]
        if not inner and id(module) in fallback:
            inner = [Block(name, module, fallback[id(module)])]
        yield from inner

    return list({id(block.module): block for block in walk(root, "")}.values())


def select_blocks(root: nn.Module, patterns: Sequence[str], *, subject: str) -> list[Block]:
    """Return the blocks that a ``modules`` argument selects, none inside another.

    Args:
        root: Searched for blocks.
        patterns: ``("auto",)`` for ``find_blocks``, else globs or class names.
        subject: The public class that asks, for the message.

    Raises:
        NothingToTransformError: If nothing repeats, a pattern selects nothing, or it selects only lists of modules.

    """
    if tuple(patterns) == ("auto",):
        blocks = find_blocks(root)
        if not blocks:
            raise NothingToTransformError(_nothing_repeats(subject, root))
        return blocks
    matched = match_modules(root, patterns, subject=subject)
    callable_ = [(name, module) for name, module in matched if is_callable(module)]
    if not callable_:
        name, module = matched[0]
        raise NothingToTransformError(
            f"{subject}: modules={list(patterns)!r} selects {name!r}, a {type(module).__name__}, which is never called "
            f"itself. Select what is in it: modules={name + '.*'!r}."
        )
    return [Block(name, module, name.rpartition(".")[0]) for name, module in _outermost(callable_)]


def is_callable(module: nn.Module) -> bool:
    """Return whether a module has a ``forward`` of its own (``ModuleList`` and ``ModuleDict`` have none)."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _outermost(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    inside: set[int] = set()
    for name, module in named:
        if id(module) not in inside:
            inside.update(id(inner) for inner in module.modules() if inner is not module)
            yield name, module


def _nothing_repeats(subject: str, root: nn.Module) -> str:
    children = [
        f"{name} ({type(module).__name__})" for name, module in root.named_modules() if name and is_callable(module)
    ]
    found = ", ".join(children[:8]) if children else "no submodules"
    return (
        f'{subject}: modules="auto" found no repeated blocks in {type(root).__name__}. It looks for several modules of '
        "one class that are more than a single layer, in a list or as numbered attributes. "
        f"Found: {found}. Name the modules yourself, with a glob over qualified names or a class name."
    )


# -- structure ---------------------------------------------------------------------------------
def _is_block(module: nn.Module) -> bool:
    """Return whether a module is more than one layer: several modules with parameters in them, or its own class."""
    if not is_callable(module) or not any(True for _ in module.parameters()):
        return False
    if next(module.children(), None) is not None:
        return True
    if isinstance(module, nn.RNNBase):
        return True
    own_class = not any(cls.__module__.startswith("torch.nn.") for cls in type(module).__mro__ if cls is not nn.Module)
    return own_class and any(parameter.ndim >= 2 for parameter in module.parameters())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def _siblings(parent: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the groups of children that repeat: two or more blocks of one class, side by side."""
    lists: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    in_container = isinstance(parent, _CONTAINERS)
    for name, child in parent.named_children():
        numbered = "" if in_container else _NUMBER.sub("#", name)
        if in_container or "#" in numbered:
            lists[numbered].append((name, child))
    groups = []
    for members in lists.values():
        blocks = [(name, child) for name, child in members if _is_block(child) or isinstance(child, _CONTAINERS)]
        counts = Counter(type(child) for _, child in blocks)
        if not counts or max(counts.values()) < 2:
            continue
        # Hybrid models mix classes in one list; a Sequential's odd ones out are its stem and its head.
        mixed = isinstance(parent, nn.ModuleList)
        groups.append([(name, child) for name, child in blocks if mixed or counts[type(child)] >= 2])
    return groups


@dataclass(frozen=True)
class _Choice:
    module: nn.Module
    group: str
    sure: bool = True


def _search(module: nn.Module, group: str) -> Iterator[_Choice]:
    """Yield the blocks below ``module``, choosing the depth of every repetition."""
    grouped: set[str] = set()
    for members in _siblings(module):
        inner = {name: list(_search(child, _join(group, name))) for name, child in members}
        descend = _descend(members, inner)
        for name, child in members:
            grouped.add(name)
            if descend and inner[name]:
                yield from inner[name]
            elif is_callable(child):
                yield _Choice(child, group, sure=not descend)
    for name, child in module.named_children():
        if name not in grouped and not _PARALLEL.search(name):
            yield from _search(child, _join(group, name))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _descend(members: list[tuple[str, nn.Module]], inner: dict[str, list[_Choice]]) -> bool:
    """Return whether the repetition inside the members is the real one (stages of blocks, twin backbones)."""
    if not all(is_callable(child) for _, child in members):
        return True
    most = max(len(blocks) for blocks in inner.values())
    if most < 2:
        return False
    outer_size = sum(_num_parameters(child) for _, child in members)
    inner_size = sum(_num_parameters(block.module) for blocks in inner.values() for block in blocks)
    if inner_size < _COVERS * outer_size:
        return False
    plain = all(type(child) is nn.Sequential for _, child in members)
    identical = max(Counter(_signature(child) for _, child in members).values())
    return plain or identical < max(2, len(members) / 2) or most > len(members)


def _single(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield ``(block, group)`` where lists hold one block each: one layer, or one layer called many times."""
    hints = {hint for module in root.modules() for hint in getattr(module, "_no_split_modules", None) or ()}
    lonely = []
    for name, parent in root.named_modules():
        if isinstance(parent, nn.ModuleList) and len(parent) == 1 and _is_block(parent[0]):
            lonely.append((parent[0], name))
        elif name and type(parent).__name__ in hints and _is_block(parent):
            lonely.append((parent, name.rpartition(".")[0]))
    for module, group in lonely:
        others = {id(other) for other, _ in lonely if other is not module}
        if not any(id(inner) in others for inner in module.modules()):
            yield module, group
