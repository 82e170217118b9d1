"""``memsave VERB``: one file per verb, imported when it is asked for.

A verb's module has three names and imports nothing heavy at its top:

* ``HELP``: its first line is shown by ``memsave --help``, all of it by ``memsave VERB --help`` (with an example);
* ``add_arguments(parser)``;
* ``run(args) -> int``: 0 done or yes, 1 the answer is no. Bad input raises ``MemsaveError`` and ends with 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from lightning_memsave import __version__
from lightning_memsave.errors import MemsaveError

__all__ = ["VERBS", "main"]

VERBS = ("doctor", "merge", "run")

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: The words after ``memsave``; those of the process by default.

    Returns:
        The exit code: 0 done or yes, 1 the answer is no, 2 bad input.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else BAD_INPUT
    if words[0] == "--version":
        print(f"memsave {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"memsave: there is no verb {verb!r}.{hint} The verbs are {', '.join(VERBS)}.", file=sys.stderr)
        return BAD_INPUT
    module = _load(verb)
    args = _parser(verb, module).parse_args(rest)
    try:
        code: int = module.run(args)
    except MemsaveError as error:
        print(f"memsave {verb}: {error}", file=sys.stderr)
        return BAD_INPUT
    return code


def _load(verb: str) -> ModuleType:
    return importlib.import_module(f"lightning_memsave.cli.{verb}")


def _parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"memsave {verb}",
        description=module.HELP.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # "--meth" would be read as "--methods" before a script's own arguments are reached
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [
        "usage: memsave VERB [...]",
        "",
        "Train the same LightningModule in less memory.",
        "",
        *(f"  {verb:<{width}}  {_load(verb).HELP.strip().splitlines()[0]}" for verb in VERBS),
        "",
        "memsave VERB --help shows the arguments and an example; python -m lightning_memsave is the same program.",
    ]
    return "\n".join(lines)
