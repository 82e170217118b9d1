"""``memsave run``: start a training script with savers attached and its code untouched."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import runpy
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

from lightning_memsave.callbacks.environment import VARIABLE
from lightning_memsave.callbacks.presets import find_methods
from lightning_memsave.errors import ConfigurationError, MemsaveError
from lightning_memsave.strategies._registry import register_on_import

__all__ = ["HELP", "add_arguments", "run"]

HELP = """
Run a training script unchanged, with savers attached to every Trainer it makes.

Examples:
  memsave run --methods basic train.py --epochs 3
  memsave run --methods memsave.yaml -m my_project.train fit --config config.yaml
  torchrun --nproc-per-node 2 -m lightning_memsave run --methods qlora train.py

Everything after the script belongs to the script, its exit code is the exit code, and processes it starts get the
same savers. The strategy names of this package (Trainer(strategy="memsave_ddp")) are known to the script.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.usage = "memsave run [--methods PRESET_OR_YAML] [--json] [-m] SCRIPT [ARGUMENTS ...]"
    parser.add_argument(
        "--methods",
        metavar="PRESET_OR_YAML",
        help=f"a preset's name, or a YAML file with a list of callbacks; what {VARIABLE} says by default",
    )
    parser.add_argument("--json", action="store_true", help="show what would be attached and run, and run nothing")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="path of a Python file (or a module's name, with -m)")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the script's own arguments")


def run(args: argparse.Namespace) -> int:
    """Run the script in this process, as ``python SCRIPT`` would."""
    methods = _methods(args.methods)
    if not args.is_module and not Path(args.script).is_file():
        raise ConfigurationError(f"there is no script {args.script!r} in {os.getcwd()}. For a module, write -m.")
    if args.json:
        print(json.dumps(_plan(args, methods), indent=2))
        return 0
    if methods:
        _check_installed()
        os.environ[VARIABLE] = methods
    else:
        print(f"[memsave] run: no methods given (--methods or {VARIABLE}), so nothing is attached.", file=sys.stderr)
    script = args.script if args.is_module else os.path.abspath(args.script)
    register_on_import(relaunch=["run", *(["-m"] if args.is_module else []), script])
    try:
        _execute(args.script, args.arguments, is_module=args.is_module)
    except MemsaveError:
        # The script's own error: shown with its traceback, as Python shows it.
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _methods(given: str | None) -> str:
    """Return the variable's value with a file's path made absolute, since scripts change their directory.

    Nothing of torch is imported here: scripts set environment variables before they import it.
    """
    value = given if given is not None else os.environ.get(VARIABLE, "")
    if not value.strip() and given is None:
        return ""
    found = find_methods(value, subject=VARIABLE if given is None else "--methods")
    return found if isinstance(found, str) else str(found.resolve())


def _plan(args: argparse.Namespace, methods: str) -> dict[str, object]:
    from lightning_memsave.callbacks._environment import load_methods

    callbacks = load_methods(methods) if methods else []
    return {
        "environment": {VARIABLE: methods} if methods else {},
        "callbacks": [repr(callback) for callback in callbacks],
        "command": ["python", *(["-m"] if args.is_module else []), args.script, *args.arguments],
    }


def _check_installed() -> None:
    if not any(e.name == "lightning_memsave" for e in entry_points(group="lightning.pytorch.callbacks_factory")):
        raise ConfigurationError(
            "lightning_memsave can be imported but is not installed, so Lightning does not find its callbacks. "
            "Install it: pip install lightning-memsave (in a checkout: pip install -e .)"
        )


def _execute(script: str, arguments: list[str], *, is_module: bool) -> None:
    """Run the script as ``__main__``, with the names that Python itself gives it.

    Lightning's ddp launcher reads ``sys.argv`` and ``__main__.__spec__`` to start the other ranks, and pickling looks
    functions up in ``sys.modules["__main__"]``; the ranks inherit the variable.
    """
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # python -P puts no folder of the script's there
        sys.path[0] = os.getcwd() if is_module else str(Path(script).resolve().parent)
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    # runpy.run_path would make __file__ relative and forget the module when it ends, before exit handlers run.
    path = os.path.abspath(script)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)
