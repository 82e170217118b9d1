"""Settings of the accelerator's cache and of the C heap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lightning_memsave.memory import allocator
from lightning_memsave.memory.allocator import (
    allocator_configuration,
    empty_cache,
    mmap_threshold_problems,
    restore_configuration,
    set_expandable_segments,
    set_mmap_threshold,
    with_expandable_segments,
)

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class FakeAllocator:
    """Stands in for CUDA's allocator: remembers the configurations it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, configuration: str = "", reserved: int = 0) -> None:
        self.configurations: list[str] = []
        self.reserved = reserved
        monkeypatch.setattr(allocator, "_configure", self.configurations.append)
        monkeypatch.setattr(allocator, "allocator_configuration", lambda: configuration)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "reserved", 0))


def test_the_users_settings_are_kept_beside_expandable_segments(monkeypatch) -> None:
    fake = FakeAllocator(monkeypatch, "max_split_size_mb:128")
    done, before = set_expandable_segments(CUDA)
    assert done == "expandable segments on"
    assert fake.configurations == ["max_split_size_mb:128,expandable_segments:True"]
    restore_configuration(before)
    assert fake.configurations[1:] == ["max_split_size_mb:128,expandable_segments:False"]


def test_it_says_when_it_is_too_late(monkeypatch) -> None:
    fake = FakeAllocator(monkeypatch, reserved=20 * 2**20)
    done, _ = set_expandable_segments(CUDA)
    assert "too late for 20.00 MiB" in done
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in done
    assert fake.configurations == ["expandable_segments:True"]


@pytest.mark.parametrize(
    ("device", "configuration", "message"),
    [
        (CPU, "", "do nothing on cpu"),
        (CUDA, "expandable_segments:False", "left as they are set: 'expandable_segments:False'"),
        (CUDA, "backend:cudaMallocAsync", "do not apply to backend:cudaMallocAsync"),
    ],
)
def test_where_nothing_is_changed_it_says_why(device, configuration, message, monkeypatch) -> None:
    fake = FakeAllocator(monkeypatch, configuration)
    done, before = set_expandable_segments(device)
    assert message in done
    assert before is None
    assert fake.configurations == []


def test_the_setter_of_this_torch_takes_and_returns_the_configuration() -> None:
    # in a process of its own: the setting belongs to the process
    variables = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "max_split_size_mb:64")
    environment = {**os.environ, **variables}
    code = (
        "from lightning_memsave.memory import allocator as a\n"
        "before = a.allocator_configuration()\n"
        "a._configure(a.with_expandable_segments(before))\n"
        "print(before, a.allocator_configuration())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == ["max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True"]


def test_the_environment_is_read_in_torchs_order() -> None:
    assert allocator_configuration({"PYTORCH_CUDA_ALLOC_CONF": "a", "PYTORCH_ALLOC_CONF": "b"}) == "b"
    assert allocator_configuration({"PYTORCH_CUDA_ALLOC_CONF": "a"}) == "a"
    assert allocator_configuration({}) == ""
    assert with_expandable_segments("") == "expandable_segments:True"


def test_emptying_the_cache_returns_what_was_given_back(monkeypatch) -> None:
    FakeAllocator(monkeypatch, reserved=512)
    assert empty_cache(CUDA) == 512
    assert empty_cache(CPU) == 0


def test_other_heaps_are_left_alone_and_named(monkeypatch) -> None:
    monkeypatch.setattr(allocator, "host_allocator", lambda: "tcmalloc")
    assert "no effect: this process uses tcmalloc" in set_mmap_threshold(2**24)
    monkeypatch.setattr(allocator, "host_allocator", lambda: None)
    assert "no effect" in set_mmap_threshold(2**24)


def test_freed_blocks_above_the_threshold_leave_the_process() -> None:
    # Blocks of 2 MiB with small ones between them: after freeing, a heap keeps what a mapping returns.
    code = (
        "import sys, torch\n"
        "from lightning_memsave.memory.allocator import set_mmap_threshold\n"
        "from lightning_memsave.memory.host import host_memory\n"
        "del_me = torch.empty(31 * 2**20, dtype=torch.uint8); del del_me  # glibc raises its threshold here\n"
        "if sys.argv[1] == 'set': print(set_mmap_threshold(2**20), file=sys.stderr)\n"
        "blocks, small = [], []\n"
        "for _ in range(60):\n"
        "    blocks.append(torch.ones(2**21, dtype=torch.uint8)); small.append(torch.ones(2**16, dtype=torch.uint8))\n"
        "before = host_memory().rss_bytes\n"
        "blocks.clear()\n"
        "print(before - host_memory().rss_bytes)"
    )
    returned = {}
    for mode in ("plain", "set"):
        out = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        returned[mode] = int(out.stdout.split()[-1])
    if "returned when freed" not in out.stderr:  # another libc: it must have said so
        assert "no effect" in out.stderr
        return
    assert returned["plain"] < 10 * 2**21
    assert returned["set"] > 58 * 2**21


@pytest.mark.parametrize("size", [0, 100, 2**25 + 1])
def test_thresholds_glibc_does_not_take_are_refused(size) -> None:
    [problem] = mmap_threshold_problems(size)
    assert "4 KiB to 32 MiB" in problem
