"""Weights leave the file they were mapped from once the others did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_memsave import LoRA, WeightQuantization, apply
from lightning_memsave.transforms._mapped import MappedFiles, leave_mapped_files
from lightning_memsave.transforms.bf16 import cast_to_bf16

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Net, Path]:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    save_file(Net().state_dict(), path)
    net = Net()
    net.load_state_dict(load_file(path), assign=True)
    assert in_maps(path)
    return net, path


def in_maps(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_values_and_parameters_stay_and_the_file_goes(mapped):
    net, path = mapped
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = list(net.parameters())
    assert leave_mapped_files(net) == sum(value.nbytes for value in before.values())
    assert all(p is q for p, q in zip(parameters, net.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not in_maps(path)
    assert leave_mapped_files(net) == 0


def test_shared_and_tied_memory_is_left_alone():
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).share_memory()
    assert leave_mapped_files(net) == 0
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    leave_mapped_files(tied)
    assert tied[1].weight is tied[0].weight


@pytest.mark.parametrize("how", ["quantized", "frozen_dtype", "bf16"])
def test_what_converts_most_weights_lets_go_of_the_file(mapped, how):
    net, path = mapped
    if how == "quantized":
        apply(net, [WeightQuantization("nf4", ["Linear"])])
    elif how == "frozen_dtype":
        apply(net, [LoRA(rank=2, modules=["Linear"], frozen_dtype="bf16")])
    else:
        cast_to_bf16(net, ("*norm*",))
    assert not in_maps(path)
    assert net(torch.ones(2, 64, dtype=torch.bfloat16 if how == "bf16" else None)).isfinite().all()


def test_pages_are_given_back_as_tensors_are_converted_and_read_again_where_wanted(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "large.safetensors"
    save_file({"a": torch.arange(2**20, dtype=torch.float32), "b": torch.ones(2**20)}, path)
    held = load_file(path)
    sums = {name: float(value.sum()) for name, value in held.items()}  # every page was read
    before = resident(path)
    MappedFiles().release(held["a"])
    assert before - resident(path) > 3.9 * 2**20
    assert {name: float(value.sum()) for name, value in held.items()} == sums


def test_pages_that_were_written_on_are_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "large.safetensors"
    save_file({"a": torch.zeros(2**20), "b": torch.zeros(2**20)}, path)
    held = load_file(path)
    held["a"].add_(1)
    MappedFiles().release(held["a"])
    assert float(held["a"].sum()) == 2**20


def test_memory_of_torchs_own_is_never_given_back():
    x = torch.ones(2**20)
    MappedFiles().release(x)
    assert float(x.sum()) == 2**20


def resident(path: Path) -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(x for x in lines[i:] if x.startswith("Rss:")).split()[1]) * 1024 for i in starts)
