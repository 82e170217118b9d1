"""The report: fields, table, files, picture and page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import TinyLM

from lightning_memsave.errors import ConfigurationError
from lightning_memsave.memory.ledger import CATEGORIES, Timeline
from lightning_memsave.memory.report import MemoryReport, last_report, set_last_report
from lightning_memsave.memory.tracker import track_memory

pytest.importorskip("matplotlib")


@pytest.fixture
def report():
    torch.manual_seed(0)
    model = TinyLM(depth=3)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(4, 16, dtype=torch.long)
    for _ in range(2):
        with track_memory(model, optimizers=[optimizer], inputs=ids) as tracker:
            model(ids).sum().backward()
            optimizer.step()
    return MemoryReport.from_measurement(
        tracker.measurement(), step=2, step_seconds=0.25, host_peak_bytes=10**9, host_allocator="glibc", by_rank=(1, 2)
    )


def test_the_fields_are_those_of_the_contract(report):
    assert tuple(report.by_category) == CATEGORIES
    assert sum(report.by_category.values()) == sum(report.by_module.values()) == report.peak_bytes
    assert {n: sum(r.values()) for n, r in report.by_module_category.items()} == report.by_module
    assert max(report.by_phase.values()) == report.peak_bytes
    assert report.saved_for_backward_bytes > 0
    assert report.reserved_bytes is None
    assert list(report.by_module.values()) == sorted(report.by_module.values(), reverse=True)
    with pytest.raises(FrozenInstanceError):
        report.peak_bytes = 0


def test_json_comes_back_equal(report, tmp_path):
    path = report.to_json(tmp_path / "deep" / "memory.json")
    assert MemoryReport.from_json(path) == report
    assert json.loads(path.read_text())["by_category"] == report.by_category


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"peak_bytes": 1}')
    with pytest.raises(ConfigurationError, match=r"expected 'lightning_memsave\.memory/1'"):
        MemoryReport.from_json(path)
    path.write_text("not json")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        MemoryReport.from_json(path)


def test_fields_of_a_later_version_are_ignored(report, tmp_path):
    path = report.to_json(tmp_path / "memory.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert MemoryReport.from_json(path) == report


def test_the_table_shows_every_part(report):
    text = report.table()
    assert text.startswith("Peak ")
    for word in ("weights", "optimizer state", "forward", "backward", "blocks.*.up", "0.25 s", "glibc", "Peak by rank"):
        assert word in text
    assert "frozen weights" not in text  # nothing of it
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_figure_is_drawn(report, tmp_path, suffix):
    path = report.figure(tmp_path / "deep" / f"memory.{suffix}")
    start = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix] in start
    assert path.stat().st_size > 5000


def test_the_svg_names_phases_and_the_peak(report, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = report.figure(tmp_path / "memory.svg").read_text()
    for word in ("forward", "backward", "optimizer", "peak ", "activations", "Live memory of step 2"):
        assert word in text


def test_another_ending_is_refused(report, tmp_path):
    with pytest.raises(ConfigurationError, match=r"\.png, \.svg, \.pdf"):
        report.figure(tmp_path / "memory.bmp")


def test_drawing_leaves_no_global_figure(report, tmp_path):
    import sys

    report.figure(tmp_path / "memory.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_the_page_stands_alone(report, tmp_path):
    page = report.to_html(tmp_path / "memory.html").read_text(encoding="utf-8")
    assert "@@" not in page
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)[0]
    names = [path.get("class") for path in ElementTree.fromstring(svg).iter() if path.tag.endswith("path")]
    assert names == ["c-weights area", "c-optimizer_state area", "c-inputs area", *names[3:]]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    totals = [sum(column) for column in zip(*(row[2] for row in data["categories"]))]
    assert max(totals) == report.peak_bytes


def test_the_page_escapes_what_it_is_given(report, tmp_path):
    hostile = replace(report, by_module_category={"<b>&": {"weights": 1}}, notes=("</script><script>alert(1)",))
    page = hostile.to_html(tmp_path / "memory.html").read_text(encoding="utf-8")
    assert "<b>&<" not in page
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page


def test_a_report_without_a_timeline_can_be_shown(tmp_path):
    empty = MemoryReport(peak_bytes=0, by_category={}, by_module={}, by_phase={}, saved_for_backward_bytes=0)
    assert empty.timeline == Timeline()
    assert "Peak 0 B" in empty.table()
    assert empty.to_html(tmp_path / "memory.html").exists()
    assert empty.figure(tmp_path / "memory.png").exists()
    assert MemoryReport.from_json(empty.to_json(tmp_path / "memory.json")) == empty


def test_the_last_report_is_the_one_that_was_set(report):
    before = last_report()
    set_last_report(report)
    assert last_report() is report
    set_last_report(before)


def test_scalars_are_what_loggers_get(report):
    scalars = report.scalars()
    assert scalars.pop("memory/peak_bytes") == report.peak_bytes
    assert scalars == {f"memory/{name}_bytes": nbytes for name, nbytes in report.by_category.items()}
