"""Host memory, and clear answers where the system has none."""

from __future__ import annotations

import sys

import pytest
import torch

from lightning_memsave.memory import host

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
SIZE = 64 * 2**20


@linux
def test_resident_bytes_follow_an_allocation():
    before = host.host_memory()
    held = torch.ones(SIZE // 4)
    after = host.host_memory()
    assert SIZE * 0.9 < after.rss_bytes - before.rss_bytes < SIZE * 1.5
    assert SIZE * 0.9 < after.anonymous_bytes - before.anonymous_bytes < SIZE * 1.5
    assert after.pss_bytes <= after.rss_bytes * 1.01
    assert after.file_bytes > 0
    assert held.numel() == SIZE // 4


@linux
def test_the_peak_starts_again_after_a_reset():
    held = torch.ones(2 * SIZE // 4)
    high = host.host_peak_bytes()
    assert held.numel() > 0
    del held
    if not host.reset_host_peak():
        pytest.skip("the kernel refuses /proc/self/clear_refs")
    low = host.host_peak_bytes()
    assert high - low > SIZE
    held = torch.ones(SIZE // 4)
    assert host.host_peak_bytes() - low > SIZE * 0.9
    assert held.numel() > 0


@linux
def test_the_allocator_is_named():
    assert host.host_allocator() in {"glibc", "musl", "tcmalloc", "jemalloc", "mimalloc"}


@linux
def test_a_preloaded_allocator_is_the_one_in_use(monkeypatch, tmp_path):
    maps = (
        "7f00-7f01 r-xp 00000000 fe:00 1 /usr/lib/libtcmalloc_minimal.so.4\n7f00-7f01 r-xp 0 fe:00 1 /lib/libc.so.6\n"
    )
    (tmp_path / "maps").write_text(maps)
    monkeypatch.setattr(host, "_PROC", tmp_path)
    with monkeypatch.context() as environment:
        environment.setenv("LD_PRELOAD", "")
        assert host.host_allocator() == "glibc"  # a dependency brought it along: malloc is still glibc's
        environment.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
        assert host.host_allocator() == "tcmalloc"


def test_without_proc_what_is_unknown_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_PROC", tmp_path / "none")
    memory = host.host_memory()
    assert (memory.rss_bytes, memory.pss_bytes, memory.anonymous_bytes) == (None, None, None)
    assert memory.peak_rss_bytes > 0  # getrusage knows the peak
    assert host.host_peak_bytes() > 0
    assert host.reset_host_peak() is False
    assert host.host_allocator() is None


@linux
def test_shared_memory_is_reported():
    free = host.shared_memory_free_bytes()
    assert free is None or free >= 0
