"""The offline set of wheels: what it is made of, and that a trimmed wheel is still a wheel."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu.bench import wheelhouse
from packaging.requirements import Requirement

FILES = {
    "fake/__init__.py": b"VALUE = 1\n",
    "fake/libbitsandbytes_cpu.so": b"cpu" * 100,
    "fake/libbitsandbytes_cuda130.so": b"cuda130" * 100,
    "fake/libbitsandbytes_cuda128.so": b"cuda128" * 100,
    "fake/libbitsandbytes_rocm71.so": b"rocm" * 100,
    "fake-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n",
    "fake-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
RECORD = "fake-1.0.dist-info/RECORD"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "fake-1.0-py3-none-any.whl"
    rows = []
    with zipfile.ZipFile(path, "w") as file:
        for name, data in FILES.items():
            file.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}")
        file.writestr(RECORD, "\n".join([*rows, f"{RECORD},,"]) + "\n")
    return path


def test_trimming_keeps_one_library_and_a_right_record(wheel: Path) -> None:
    before = wheel.stat().st_size
    removed = wheelhouse.trim_wheel(wheel, "*/libbitsandbytes_*.so", wheelhouse.KEEP)
    assert removed == ["fake/libbitsandbytes_cuda128.so", "fake/libbitsandbytes_rocm71.so"]
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == (set(FILES) | {RECORD}) - set(removed)
        assert all(file.read(name) == data for name, data in FILES.items() if name not in removed)
        record = file.read(RECORD).decode()
    assert "cuda128" not in record
    assert len(record.splitlines()) == len(FILES) + 1 - len(removed)
    assert wheelhouse.wrong_hashes(wheel) == []
    assert wheel.stat().st_size < before
    assert list(wheel.parent.iterdir()) == [wheel]


def test_pip_installs_a_trimmed_wheel(wheel: Path, tmp_path: Path) -> None:
    wheelhouse.trim_wheel(wheel, "*/libbitsandbytes_*.so", wheelhouse.KEEP)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*command, "--disable-pip-version-check", "--target", tmp_path / "site", wheel], check=True)
    installed = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site" / "fake").iterdir()}
    assert installed == {name for name in FILES if name.startswith("fake/") and "cuda128" not in name} - {
        "fake/libbitsandbytes_rocm71.so"
    }


def test_a_missing_library_leaves_the_wheel_as_it_was(wheel: Path) -> None:
    before = wheel.read_bytes()
    with pytest.raises(ValueError, match=r"asked to keep libbitsandbytes_cuda999\.so; it has .*cuda130"):
        wheelhouse.trim_wheel(wheel, "*/libbitsandbytes_*.so", ["libbitsandbytes_cuda999.so"])
    assert wheel.read_bytes() == before


def test_a_zip_without_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "not-a-wheel.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(ValueError, match=r"it has no \.dist-info/RECORD"):
        wheelhouse.trim_wheel(path, "*.so", [])


def test_a_changed_file_is_seen(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("fake/extra.py", "")
    assert wheelhouse.wrong_hashes(wheel) == ["fake/extra.py"]


def test_the_set_holds_what_the_suite_imports_and_not_torch() -> None:
    found = wheelhouse.closure(wheelhouse.ROOTS)
    assert {"bitsandbytes", "lightning-utilities", "peft", "pytorch-lightning", "tokenizers", "torchmetrics"} <= set(
        found
    )
    assert not {"torch", "triton", "sympy", "networkx"} & set(found)
    assert all(found[root] for root in wheelhouse.ROOTS)
    assert "numpy" not in wheelhouse.closure(wheelhouse.ROOTS, wheelhouse.OUTSIDE | {"numpy"})


def test_requirements_are_read_for_the_target_machine_and_not_for_this_one() -> None:
    def applies(line: str, *extras: str) -> bool:
        return wheelhouse.applies(Requirement(line).marker, extras)

    assert applies("a")
    assert applies("a; python_version >= '3.12'")
    assert not applies("a; sys_platform == 'win32'")
    assert not applies("a; extra == 'dev'")
    assert applies("a; extra == 'http'", "http")
