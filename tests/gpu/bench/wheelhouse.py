"""Download a small set of wheels for a GPU machine without internet, and trim what that machine cannot use.

    make wheelhouse                        # or, in an environment of your own:
    python tests/gpu/bench/wheelhouse.py
    # copy this checkout with wheelhouse/ to the machine, whose Python 3.12 has torch for CUDA 13, and there:
    python3 -m pip install --no-index --no-deps --target site wheelhouse/*.whl
    PYTHONPATH=site python3 tests/gpu/bench/bench_suite.py

The set is what the GPU suite imports and everything that needs, in the versions installed here, without torch and
what only torch needs. bitsandbytes ships one library for each CUDA, ROCm and XPU version; one of them is kept.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
ROOTS = ("accelerate", "bitsandbytes", "lightning", "peft", "pytorch-lightning", "rich", "transformers")
OUTSIDE = frozenset({"torch"})  # the machine has it, and with it everything that only it needs
LIMIT_BYTES = 64 * 2**20
KEEP = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
TARGET = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}


def applies(marker: Marker | None, extras: Iterable[str]) -> bool:
    """Return whether a requirement holds on the target machine, with one of the extras or none."""
    return marker is None or any(marker.evaluate({**TARGET, "extra": extra}) for extra in ("", *extras))


def closure(roots: Iterable[str], outside: frozenset[str] = OUTSIDE) -> dict[str, str | None]:
    """Return the roots and all they need as ``name -> installed version`` (``None``: not installed here)."""
    found: dict[str, str | None] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(name) for name in roots]
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in outside or (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            continue
        found[name] = distribution.version
        needs = [Requirement(line) for line in distribution.requires or ()]
        queue += [need for need in needs if applies(need.marker, extras)]
    return dict(sorted(found.items()))


def download(pins: Iterable[str], folder: Path) -> None:
    """Download wheels for the target machine, exactly those that are named.

    Raises:
        SystemExit: If pip fails; it has said why.

    """
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, *target, "--dest", str(folder), *pins], check=False)
    if done.returncode:
        raise SystemExit("wheelhouse: pip could not download all wheels, see above.")


def trim_wheel(path: Path, drop: str, keep: Sequence[str]) -> list[str]:
    """Remove the files that match ``drop`` from a wheel, except those named in ``keep``; rewrite its RECORD.

    Args:
        path: The wheel; it is replaced at once, or left as it is if anything fails.
        drop: A glob over file names inside it, e.g. ``"*/libbitsandbytes_*.so"``.
        keep: File names to leave in; every one must be there.

    Returns:
        What was removed.

    Raises:
        ValueError: If a file to keep is missing, or the wheel has no RECORD.

    """
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        matching = [name for name in names if fnmatchcase(name, drop)]
        missing = [name for name in keep if name not in {Path(m).name for m in matching}]
        record = next((name for name in names if name.endswith(".dist-info/RECORD")), None)
        if missing or record is None:
            raise ValueError(
                f"{path.name}: asked to keep {', '.join(missing)}; it has {', '.join(Path(m).name for m in matching)}"
                if missing
                else f"{path.name} is not a wheel: it has no .dist-info/RECORD"
            )
        removed = [name for name in matching if Path(name).name not in keep]
        temporary = path.with_suffix(".trimmed")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as trimmed:
            for item in wheel.infolist():
                if item.filename in removed:
                    continue
                data = wheel.read(item)
                if item.filename == record:
                    data = _without(data, set(removed))
                trimmed.writestr(item, data, zipfile.ZIP_DEFLATED)
    os.replace(temporary, path)
    return removed


def _without(record: bytes, removed: set[str]) -> bytes:
    rows = [row for row in csv.reader(io.StringIO(record.decode())) if row and row[0] not in removed]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def wrong_hashes(path: Path) -> list[str]:
    """Return the files of a wheel that do not agree with its RECORD: changed, not listed, or not there."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(wheel.read(record).decode())) if row}
        wrong = names ^ set(rows)
        for name, expected in rows.items():
            if name in names and expected:
                digest = hashlib.new(expected.split("=")[0], wheel.read(name)).digest()
                if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected.split("=", 1)[1]:
                    wrong.add(name)
    return sorted(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder and return the exit status: 1 if it is larger than the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "wheelhouse", help="where the wheels go")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="what the machine has already")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("*.whl"):
        old.unlink()
    outside = OUTSIDE | {canonicalize_name(name) for name in options.without}
    pins = [f"{name}=={version}" if version else name for name, version in closure(ROOTS, outside).items()]
    download(pins, options.folder)
    for wheel in options.folder.glob("bitsandbytes-*.whl"):
        trim_wheel(wheel, "*/libbitsandbytes_*.so", KEEP)
    wheels = sorted(options.folder.glob("*.whl"), key=lambda p: p.stat().st_size, reverse=True)
    broken = {wheel.name: wrong for wheel in wheels if (wrong := wrong_hashes(wheel))}
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:8.2f} MiB  in {len(wheels)} wheels (limit {LIMIT_BYTES / 2**20:.0f} MiB)")
    for name, wrong in broken.items():
        print(f"wheelhouse: {name} does not agree with its RECORD: {', '.join(wrong[:5])}")
    if total > LIMIT_BYTES:
        print("wheelhouse: too large; name what the machine has already, e.g. --without numpy transformers")
    return 1 if broken or total > LIMIT_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
