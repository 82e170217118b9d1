"""Giving freed host memory back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_memsave.memory.heap_trim import HeapTrimmer, heap_release
from lightning_memsave.memory.host import host_memory
from lightning_memsave.units import MIB

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")

# Blocks below glibc's threshold with used ones between them, which are too large for holes elsewhere: freed, they stay
# resident. 300 MiB are freed between 75 MiB, and 80 MiB are added: a trimmed process has grown by about 155 MiB, and
# another by about 455 MiB. At the end it waits for the trimmer's thread, which a busy machine may run late.
FRAGMENT = """
import sys, time, torch
from lightning_memsave.memory.heap_trim import HeapTrimmer
from lightning_memsave.memory.host import host_allocator, host_memory
x = torch.ones(6 * 2**20); del x  # freeing 24 MiB makes glibc keep blocks of 1 MiB in its heap
start = host_memory().rss_bytes
trimmer = HeapTrimmer(16 * 2**20)
said = trimmer.start() if sys.argv[1] == "trim" else ""
blocks = [torch.ones(2**18 if i % 2 else 2**16) for i in range(600)]
held = blocks[0::2]
del blocks
more = torch.ones(20 * 2**20)  # the process grows: the freed blocks go
deadline = time.monotonic() + (60 if said else 0)
limit = 250 * 2**20 if "(glibc)" in said else 2**40
while True:
    grown, released = host_memory().rss_bytes - start, trimmer.num_releases
    if (released and grown < limit) or time.monotonic() > deadline:
        break
    time.sleep(0.02)
trimmer.close()
print(host_allocator(), trimmer.num_releases, grown, said, sep="|")
"""


def library(name: str) -> str:
    found = sorted(Path("/usr/lib").glob(f"*/lib{name}*.so.*"))
    if not found:
        pytest.skip(f"{name} is not installed")
    return str(found[0])


def fragment(mode: str, preload: str = "") -> tuple[str, int, int, str]:
    environment = {**os.environ, "LD_PRELOAD": preload} if preload else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", FRAGMENT, mode], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    heap, releases, grown, said = done.stdout.strip().split("|")
    return heap, int(releases), int(grown), said


def test_a_fragmented_glibc_heap_is_given_back():
    heap, _, grown, _ = fragment("none")
    if heap != "glibc":
        pytest.skip(f"this process uses {heap}")
    assert grown > 400 * MIB
    _, releases, grown, said = fragment("trim")
    assert releases >= 1
    assert "16.00 MiB of growth (glibc)" in said
    assert grown < 250 * MIB


@pytest.mark.parametrize("name", ["tcmalloc_minimal.so", "jemalloc", "mimalloc"])
def test_other_heaps_are_given_back(name):
    heap, releases, _, said = fragment("trim", library(name.removesuffix(".so")))
    assert heap in name
    assert releases >= 1
    assert f"({heap})" in said


def test_nothing_is_given_back_while_the_process_does_not_grow():
    trimmer = HeapTrimmer(2**40)
    trimmer.start()
    time.sleep(0.1)
    trimmer.close()
    assert trimmer.num_releases == 0


def test_the_thread_ends_with_close():
    trimmer = HeapTrimmer(MIB)
    trimmer.start()
    assert "memsave-host-trim" in {t.name for t in threading.enumerate()}
    trimmer.close()
    trimmer.close()
    assert "memsave-host-trim" not in {t.name for t in threading.enumerate()}


def test_values_survive_a_release():
    x = torch.arange(2**20)
    release = heap_release()
    assert release is not None
    release()
    assert int(x.sum()) == 2**19 * (2**20 - 1)
    assert host_memory().rss_bytes


def test_an_unknown_heap_says_that_nothing_happens(monkeypatch):
    monkeypatch.setattr("lightning_memsave.memory.heap_trim.host_allocator", lambda: "musl")
    trimmer = HeapTrimmer(MIB)
    assert trimmer.start() == "host_trim has no effect: no way is known to trim musl"
    trimmer.close()
    assert heap_release("musl") is None
