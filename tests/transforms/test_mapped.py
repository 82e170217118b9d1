"""Weights leave the file they were mapped from once the others did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_memsave import LoRA, WeightQuantization, apply
from lightning_memsave.transforms._mapped import leave_mapped_files
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
