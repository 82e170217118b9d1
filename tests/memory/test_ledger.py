"""Replaying a log: the peak, the timeline, and what a lifetime says."""

from __future__ import annotations

import pytest

from lightning_memsave.memory.ledger import ACTIVATIONS, TEMPORARIES, WEIGHTS, Block, Log, measure


def make_log(*steps, initial=(), marks=()):
    """``steps`` are ``(name, change, phase)``; a block is freed by a negative change of its whole size."""
    log, blocks = Log(marks=list(marks), starts=list(marks)), {}
    for name, nbytes in initial:
        blocks[name] = Block(nbytes, "cpu", name, WEIGHTS)
        log.initial.append((blocks[name], nbytes))
    for index, (name, change, phase) in enumerate(steps):
        if name not in blocks:
            blocks[name] = Block(change, "cpu", name, None, candidate=phase == 0, born=index)
        elif change < 0:
            blocks[name].died = index
        log.events.append((blocks[name], change, phase))
    return log, blocks


def test_a_forward_tensor_that_lives_when_backward_begins_is_an_activation():
    log, blocks = make_log(("kept", 8, 0), ("gone", 4, 0), ("gone", -4, 0), ("grad", 2, 1), ("kept", -8, 1), marks=[3])
    assert blocks["kept"].settle(log.marks) == ACTIVATIONS
    assert blocks["gone"].settle(log.marks) == TEMPORARIES
    assert blocks["grad"].settle(log.marks) == TEMPORARIES


def test_a_tensor_made_after_the_last_mark_is_temporary():
    log, blocks = make_log(("late", 8, 0), marks=[0])
    assert blocks["late"].settle(log.marks) == TEMPORARIES
    log.marks.append(1)
    assert blocks["late"].settle(log.marks) == ACTIVATIONS


def test_the_peak_is_the_highest_moment_not_the_last():
    log, _ = make_log(("a", 10, 0), ("b", 20, 0), ("b", -20, 0), ("c", 15, 1), initial=[("w", 100)], marks=[3])
    found = measure(log)
    assert found.peak_bytes == 130
    assert found.by_module == {"w": {"weights": 100}, "b": {"temporaries": 20}, "a": {"activations": 10}}
    assert found.by_phase == {"forward": 130, "backward": 125}
    assert found.saved_for_backward_bytes == 10


def test_a_step_that_only_frees_peaks_before_it_begins():
    log, _ = make_log(("w", -100, 0), initial=[("w", 100)])
    found = measure(log)
    assert found.peak_bytes == 100
    assert found.timeline.totals[found.timeline.peak_point] == 100


def test_other_devices_are_left_out():
    log, _ = make_log(("a", 10, 0))
    host, device = Block(1000, "cpu", "x", None, born=1), Block(7, "cuda", "y", None, born=2)
    log.events += [(host, 1000, 0), (device, 7, 0)]
    assert log.main_device() == "cuda"
    assert measure(log).peak_bytes == 7
    assert measure(log, "cpu").peak_bytes == 1010


@pytest.mark.parametrize("num_events", [10, 5000])
def test_a_thinned_timeline_keeps_the_peak(num_events):
    steps = []
    for index in range(num_events // 2):
        steps += [(index, 1 + index % 97, 0), (index, -(1 + index % 97), 0)]
    steps.insert(num_events // 3 * 1, ("high", 1000, 0))
    log, _ = make_log(*steps)
    found = measure(log, num_points=100)
    assert len(found.timeline.events) <= 101
    assert max(found.timeline.totals) == found.peak_bytes
    assert found.timeline.totals[found.timeline.peak_point] == found.peak_bytes
    assert found.timeline.num_events == num_events + 1


def test_phases_that_alternate_do_not_blow_up_the_timeline():
    steps = [(index, 1, 1 + index % 2) for index in range(3000)]
    log, _ = make_log(*steps)
    assert len(measure(log, num_points=100).timeline.events) <= 101


def test_an_empty_log_is_zero():
    found = measure(Log())
    assert (found.peak_bytes, found.by_module, found.by_phase) == (0, {}, {})
