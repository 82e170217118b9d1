"""Position-wise modules in tiles: same values, less memory, refused where positions mix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import TinyLM
from live_bytes import LiveBytes
from torch import Tensor, nn

from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.memory.saved import saved_activation_bytes
from lightning_memsave.transforms.tiling import DEFAULT_PATTERNS, tile_counts, tile_modules

# Tiles of a weight's gradient are added in another order: 4.4e-16 is the worst seen in fp64.
ADDED = 1e-14


class Mlp(nn.Module):
    def __init__(self, width: int = 16, inner: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, inner), nn.Linear(inner, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.dropout(self.down(torch.relu(self.up(x)))) * scale


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), Mlp(dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x), scale=0.5)


def make(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(dropout), Layer(dropout)).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("tokens", [7, 12, 13])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_the_whole(tokens, frozen):
    plain, tiled = make(), make()
    for model in (plain, tiled):
        model[0].mlp.up.weight.requires_grad_(not frozen)
    tile_modules(tiled, DEFAULT_PATTERNS, tile_tokens=4)
    x = torch.randn(3, tokens, 16, dtype=torch.float64)
    for expected, found in zip(gradients(plain, x), gradients(tiled, x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=ADDED)
    assert {name: c.tiled for name, c in tile_counts(tiled).items()} == dict.fromkeys(
        ("0.norm", "0.mlp", "1.norm", "1.mlp"), 1
    )


def test_short_inputs_run_as_they_are():
    plain, tiled = make(torch.float32), make(torch.float32)
    tile_modules(tiled, DEFAULT_PATTERNS, tile_tokens=8)
    x = torch.randn(2, 8, 16)
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain, x), gradients(tiled, x)))
    assert not any(c.tiled for c in tile_counts(tiled).values())


def test_inference_is_tiled_too():
    plain, tiled = make(), make()
    tile_modules(tiled, DEFAULT_PATTERNS, tile_tokens=4)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tiled(x), plain(x), rtol=0, atol=ADDED)
    assert all(c.tiled == 1 for c in tile_counts(tiled).values())


def test_only_the_input_of_a_tiled_module_is_saved():
    batch, tokens, width, inner = 2, 64, 16, 64
    plain, tiled = Mlp().float(), nn.Sequential(Mlp().float())
    x = torch.randn(batch, tokens, width, requires_grad=True)
    # the whole keeps the input and relu's result
    assert saved_activation_bytes(plain, None, x) == 4 * batch * tokens * (width + inner)
    tile_modules(tiled, ["0"], tile_tokens=8)
    assert saved_activation_bytes(tiled, None, x) == 4 * batch * tokens * width


def test_the_peak_is_one_tile_of_the_inner_width():
    batch, tokens, tile, width, inner = 1, 512, 32, 16, 256

    def peak(tiled: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(Mlp(width, inner))
        if tiled:
            tile_modules(model, ["0"], tile_tokens=tile)
            tile_counts(model)["0"].probed = True
        x = torch.randn(batch, tokens, width, requires_grad=True)
        with LiveBytes() as live:
            model(x).sum().backward()
        return live.peak

    inner_bytes = 4 * batch * tokens * inner
    assert peak(False) > 3 * inner_bytes  # up's result, relu's, and the gradient of one of them
    assert peak(True) < 0.5 * inner_bytes


def test_dropout_masks_are_repeated_in_backward():
    tiled = make(dropout=0.5)
    tile_modules(tiled, ["*.mlp"], tile_tokens=4)
    mlp = tiled[0].mlp
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    torch.manual_seed(3)
    out = mlp(x)
    kept = out != 0
    mlp.down.bias.grad = None
    out.sum().backward()
    # the bias reaches every kept value once, times 2 for the dropout
    torch.testing.assert_close(mlp.down.bias.grad, 2.0 * kept.sum((0, 1)).double())
    after = torch.rand(1)
    torch.manual_seed(3)
    mlp(x)
    assert torch.equal(after, torch.rand(1)), "backward drew from the global random state"


def test_autocast_is_repeated_in_backward():
    tiled = make(torch.float32)
    tile_modules(tiled, ["*.mlp"], tile_tokens=4)
    seen = []
    tiled[0].mlp.up.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = tiled(torch.randn(2, 8, 16))
    out.float().sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3 + 2 + 2  # the probe, two tiles, two tiles again


def test_bf16_gradients_are_added_in_fp32():
    torch.manual_seed(0)
    x = torch.randn(1, 4096, 16)
    exact = nn.Sequential(Mlp()).double()
    expected = gradients(exact, x.double())[2:]
    tiled = copy.deepcopy(exact).bfloat16()
    for p, q in zip(tiled.parameters(), exact.parameters()):
        q.data = p.data.double()
    exact.zero_grad()
    expected = gradients(exact, x.bfloat16().double())[2:]
    tiled.zero_grad()
    tile_modules(tiled, ["0"], tile_tokens=4)
    for want, got in zip(expected, gradients(tiled, x.bfloat16())[2:]):
        assert got.dtype == torch.bfloat16
        # 1024 tiles: 0.0032 of the largest value is the worst seen; added up in bf16 it is 0.54
        assert float((got.double() - want).abs().max() / want.abs().max()) < 0.01


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(-2, keepdim=True)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Mixing(), "mixes positions"),
        (nn.GRU(16, 16, batch_first=True), "returned tuple"),
        (nn.Softmax(dim=-2), "mixes positions"),
    ],
)
def test_a_module_that_mixes_positions_is_refused(module, message):
    model = nn.Sequential(module)
    tile_modules(model, ["0"], tile_tokens=4)
    with pytest.raises(ConfigurationError, match=f"'0' {message}.*Name other modules"):
        model(torch.randn(2, 8, 16))


def test_batch_statistics_are_refused_before_anything_changes():
    model = nn.Sequential(Layer(), nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(ConfigurationError, match="'1' holds the batch norm '0'"):
        tile_modules(model, ["*norm*", "1"], tile_tokens=4)
    assert not tile_counts(model)


def test_two_tensors_are_refused_and_a_keyword_or_a_single_position_is_taken():
    model = nn.Sequential(Mlp())
    tile_modules(model, ["0"], tile_tokens=4)
    x = torch.randn(2, 8, 16)
    with pytest.raises(ConfigurationError, match="'0' was called with 2 tensors"):
        model[0](x, scale=torch.ones(8, 1))
    torch.testing.assert_close(model[0](x=x), model[0](x))
    assert torch.equal(model[0](x[0, 0]), model[0].down(torch.relu(model[0].up(x[0, 0]))))
    with pytest.raises(ConfigurationError, match=r"called with a torch.int64 tensor of shape \(2, 8\)"):
        model[0](torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_derivative_is_that_of_the_whole(dropout):
    def second(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(5)
        x = torch.linspace(-1, 1, 2 * 8 * 16, dtype=torch.float64).view(2, 8, 16).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    tiled, pieces = make(dropout=dropout), make(dropout=dropout)
    tile_modules(tiled, ["*.mlp"], tile_tokens=4)
    for layer in pieces:  # the same masks: the whole module, called on the same pieces
        whole = layer.mlp
        layer.mlp = _Pieces(whole)
    for module in tiled:
        module.mlp.__dict__["forward"].options["counts"].probed = True
    for expected, found in zip(second(pieces), second(tiled)):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)  # 2.6e-16 is the worst seen


class _Pieces(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return torch.cat([self.inner(piece, scale=scale) for piece in x.split(4, dim=-2)], dim=-2)


def test_the_outermost_of_nested_matches_is_taken_and_lists_are_refused():
    model = nn.Module()
    model.mlp = Mlp()
    model.mlp.norm = nn.LayerNorm(16)
    model.norms = nn.ModuleList([nn.LayerNorm(16)])
    tile_modules(model, DEFAULT_PATTERNS, tile_tokens=4)
    assert list(tile_counts(model)) == ["mlp", "norms.0"]
    with pytest.raises(NothingToTransformError, match=r"only lists of modules.*'norms\.\*'"):
        tile_modules(model, ["norms"], tile_tokens=4)
    with pytest.raises(NothingToTransformError, match="matched none"):
        tile_modules(model, ["*mlp*", "*attention*"], tile_tokens=4)
    with pytest.raises(NothingToTransformError, match="matched none"):
        tile_modules(nn.Sequential(nn.Linear(1, 1)), DEFAULT_PATTERNS, tile_tokens=4)


def test_undo_leaves_the_model_as_it_was_and_copies_are_their_own():
    model = TinyLM()
    keys, forwards = list(model.state_dict()), [m.__dict__.get("forward") for m in model.modules()]
    applied = tile_modules(model, ["*norm*"], tile_tokens=4)
    assert applied.num_modules == 5
    assert list(model.state_dict()) == keys
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        other.norm.weight.zero_()
    assert not torch.equal(model(torch.ones(1, 9, dtype=torch.int64)), other(torch.ones(1, 9, dtype=torch.int64)))
    applied.undo()
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
