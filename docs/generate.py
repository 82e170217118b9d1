"""Write the tables of README.md, docs/methods.md and docs/how-to/optimizers.md from the package's own tables.

python docs/generate.py            # after a change of the catalog, the compatibility table, an optimizer or a preset
python docs/generate.py --check    # exit code 1 if a page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightning_memsave.callbacks.presets import PRESETS
from lightning_memsave.optim.registry import OPTIMIZERS, OptimizerRow
from lightning_memsave.planner.catalog import CATALOG, Method
from lightning_memsave.planner.compatibility import (
    METHOD_CONDITIONS,
    METHOD_PAIRS,
    METHOD_STRATEGIES,
    STRATEGIES,
    cell,
    partners_refused,
)

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "how-to" / "optimizers.md")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


_REFERENCE = {"callbacks": "callbacks", "strategy": "strategies", "plugins": "precision"}


def link(method: Method) -> str:
    return f"[`{method.name}`](reference/{_REFERENCE[method.slot]}.md#lightning_memsave.{method.name})"


def when_to_use() -> str:
    """Return what each method is for and what it does."""
    header = ["Method", "When to use", "Saves", "Costs", "Numbers"]
    return table(header, ([link(m), m.use_when, m.saves, m.costs, m.numerics] for m in CATALOG))


def needs() -> str:
    """Return what each method needs and excludes, and what was measured."""

    def row(method: Method) -> list[str]:
        libraries = ", ".join(method.requires) or "nothing more"
        return [link(method), libraries, not_with(method.name), method.measured or "-"]

    return table(["Method", "Needs", "Not together with", "Measured"], map(row, CATALOG))


def not_with(name: str) -> str:
    """Return what a method is refused with: other methods and strategies."""
    partners = [f"`{partner}`" for partner in partners_refused(name)]
    strategies = [f"{kind} strategy" for method, kind in METHOD_STRATEGIES if method == name]
    return ", ".join([*partners, *strategies]) or "-"


def short_table() -> str:
    """Return the table of README.md."""
    return table(
        ["Method", "Saves", "Costs", "Numbers"],
        ([f"`{m.name}`", m.saves, m.costs, m.numerics] for m in CATALOG),
    )


def strategies() -> str:
    """Return method x strategy."""
    return table(
        ["Method", *STRATEGIES],
        ([f"`{m.name}`", *(cell(m.name, kind)[0] for kind in STRATEGIES)] for m in CATALOG if m.slot != "strategy"),
    )


def refusals() -> str:
    """Return every refusal with its reason."""
    pairs = [(" + ".join(f"`{n}`" for n in sorted(pair)), reason) for pair, reason in METHOD_PAIRS.items()]
    cells = [(f"`{method}` on {kind}", reason) for (method, kind), reason in METHOD_STRATEGIES.items()]
    conditions = [(f"`{method}` on {kind}: partly", reason) for (method, kind), reason in METHOD_CONDITIONS.items()]
    return table(["Not together", "Why, and what to write instead"], sorted(pairs) + sorted(cells) + sorted(conditions))


def presets() -> str:
    """Return the presets with their members."""

    def members(name: str) -> str:
        shown = []
        for member, arguments in PRESETS[name].members:
            inside = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            shown.append(f"`{member}({inside})`")
        return ", ".join(shown)

    return table(
        ["Preset", "When to use", "Callbacks"], ([f"`{n}`", p.use_when, members(n)] for n, p in PRESETS.items())
    )


def optimizers() -> str:
    """Return one row an optimizer name: bytes, rule, source."""

    def row(name: str, one: OptimizerRow) -> list[str]:
        dtype = torch.float32 if one.master == "0" else torch.bfloat16
        matrix = torch.empty(4096, 4096, dtype=dtype, device="meta")
        state = one.state_bytes(matrix, False, {}) / matrix.numel()
        paper, _, link = one.source.rpartition(", ")
        library = "bitsandbytes" if one.library == "bitsandbytes" else "-"
        return [f"`{name}`", one.state, f"{state:.3g}", one.master, one.numerics, library, f"[{paper}]({link})"]

    header = ["Name", "State, bytes a value", "4096 x 4096", "Master weights", "Rule", "Needs", "Source"]
    return table(header, (row(name, one) for name, one in OPTIMIZERS.items()))


TABLES: dict[str, Callable[[], str]] = {
    "when-to-use": when_to_use,
    "needs": needs,
    "short": short_table,
    "strategies": strategies,
    "refusals": refusals,
    "presets": presets,
    "optimizers": optimizers,
}
BLOCK = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """Return a page with its tables made anew."""
    return BLOCK.sub(lambda m: f"<!-- generated: {m[1]} -->\n\n{TABLES[m[1]]()}\n\n<!-- end -->", text)


def main() -> int:
    """Write the pages, or say which are out of date."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)} is out of date" if "--check" in sys.argv else f"writing {page}")
        if "--check" not in sys.argv:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
