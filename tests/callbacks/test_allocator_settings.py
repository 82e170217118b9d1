"""Allocator settings hold for a run, are reported, and are taken back."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.plugins import MixedPrecision

from lightning_memsave import ActivationCheckpointing, AllocatorSettings
from lightning_memsave.callbacks import allocator_settings
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory import allocator


class Lines(pl.Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        session = Session.find(trainer)
        self.lines = [line for name, line in session.lines if name == "AllocatorSettings"] if session else []


def fit(module: Any, *callbacks: Any, **options: Any) -> tuple[Any, list[str]]:
    lines = Lines()
    trainer = make_trainer(callbacks=[*callbacks, lines], **options)
    trainer.fit(module, make_loader())
    return trainer, lines.lines


@pytest.fixture(autouse=True)
def heap(monkeypatch) -> Any:
    """Say which heap the process has; none that is known, unless a test names one."""

    def set_heap(name: str | None) -> None:
        monkeypatch.setattr(allocator_settings, "host_allocator", lambda: name)

    set_heap(None)
    return set_heap


TRIMS = "freed host memory is given back for every 1.00 GiB of growth"


@pytest.mark.parametrize(("name", "trims"), [("glibc", True), ("tcmalloc", False), (None, False)])
def test_glibcs_heap_is_trimmed_while_the_cpu_trains(heap, name, trims) -> None:
    heap(name)
    _, lines = fit(LitLM(), AllocatorSettings(expandable_segments=False))
    assert [line.partition(" (")[0] for line in lines] == ([TRIMS] if trims else [])
    assert "memsave-host-trim" not in {thread.name for thread in threading.enumerate()}


def test_the_heap_is_left_alone_where_asked_or_where_nothing_trains(heap) -> None:
    heap("glibc")
    assert fit(LitLM(), AllocatorSettings(expandable_segments=False, host_trim=None))[1] == []
    callback = AllocatorSettings(expandable_segments=False)
    assert callback._growth(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"))), "validate") == 0
    assert callback._growth(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda"))), "fit") == 0


def test_on_the_cpu_it_says_that_it_has_nothing_to_do() -> None:
    _, lines = fit(LitLM(), AllocatorSettings())
    assert lines == ["expandable segments do nothing on cpu: it has no caching allocator to set"]


def test_the_setting_holds_for_the_run_and_goes_back_after_it(monkeypatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(allocator, "_configure", set_to.append)
    monkeypatch.setattr(allocator, "allocator_configuration", lambda: "max_split_size_mb:64")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    inner = allocator.set_expandable_segments
    monkeypatch.setattr(
        allocator_settings, "set_expandable_segments", lambda device: inner(torch.device("cuda", device.index or 0))
    )
    monkeypatch.setattr(allocator_settings, "empty_cache", lambda device: 3 * 2**30)
    _, lines = fit(LitLM(), AllocatorSettings())
    assert set_to == [f"max_split_size_mb:64,expandable_segments:{on}" for on in (True, False)]
    assert lines == ["expandable segments on", "3.00 GiB of cached memory given back after setup"]


def test_each_setting_can_be_left_out(monkeypatch) -> None:
    monkeypatch.setattr(allocator_settings, "empty_cache", lambda device: pytest.fail("must not be called"))
    _, lines = fit(LitLM(), AllocatorSettings(expandable_segments=False, empty_cache_after_setup=False))
    assert lines == []


def test_the_host_threshold_is_set_once_it_is_asked_for(monkeypatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(allocator_settings, "set_mmap_threshold", lambda size: sizes.append(size) or "done")
    _, lines = fit(LitLM(), AllocatorSettings(expandable_segments=False, host_mmap_threshold="16MiB"))
    assert sizes == [16 * 2**20]
    assert lines == ["done"]


# -- autocast's copies ------------------------------------------------------------------------------------------------
class Reusing(LitLM):
    """Calls its network twice in a step."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) + super().loss(batch.flip(1))


@pytest.mark.parametrize("module", [LitLM, Reusing])
@pytest.mark.parametrize("policy", ["auto", "on", "off"])
def test_the_policy_is_said_and_changes_only_how_gradients_of_a_reused_weight_add_up(policy, module) -> None:
    plain, cached = module(), module()
    fit(plain, precision="bf16-mixed")
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        default = "on" if torch.is_autocast_cache_enabled() else "off"  # on before Lightning 2.6
    trainer, lines = fit(cached, AllocatorSettings(autocast_cache=policy), precision="bf16-mixed")
    kept = policy == "on" or (policy == "auto" and module is Reusing)
    if policy != default and module is Reusing:  # kept: the gradients of both uses add up in bf16; worst seen: 1.4e-4
        assert cached.losses == pytest.approx(plain.losses, abs=1e-3)
    else:
        assert cached.losses == plain.losses
    assert lines[1:] == [
        "autocast's copies of the weights are "
        + ("kept until the forward ends" if kept else "not kept: each use of a weight makes its own")
    ]
    assert "autocast_context_manager" not in vars(trainer.precision_plugin)


def test_auto_keeps_nothing_where_activations_are_recomputed() -> None:
    _, lines = fit(
        Reusing(), AllocatorSettings(autocast_cache="auto"), ActivationCheckpointing(), precision="bf16-mixed"
    )
    assert lines[-1].endswith("not kept: each use of a weight makes its own")


def test_a_precision_without_autocast_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"autocast_cache is for .*precision='32-true'"):
        fit(LitLM(), AllocatorSettings(autocast_cache="on"))


def test_all_wrong_values_are_listed_at_construction() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)host_mmap_threshold.*16 potatoes.*autocast_cache='maybe'"):
        AllocatorSettings(host_mmap_threshold="16 potatoes", autocast_cache="maybe")
    with pytest.raises(ConfigurationError, match=r"host_mmap_threshold=1.00 GiB: glibc takes 4 KiB to 32 MiB"):
        AllocatorSettings(host_mmap_threshold="1GiB")
