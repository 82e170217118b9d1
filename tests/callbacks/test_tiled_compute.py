"""``TiledCompute`` in a Trainer."""

from __future__ import annotations

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer

from lightning_memsave import ActivationCheckpointing, LoRA, TiledCompute, apply
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.transforms.tiling import tile_counts

# Tiles of a weight's gradient are added in another order: 4.2e-15 is the worst difference of a weight seen after
# three steps of AdamW in fp64.
WEIGHTS = 1e-12


def train(callbacks, **trainer):
    module = LitLM().double()
    torch.manual_seed(1)
    made = make_trainer(callbacks=callbacks, precision="64-true", **trainer)
    made.fit(module, make_loader(num_tokens=33))
    return module


@pytest.mark.parametrize("others", [[], [ActivationCheckpointing()]], ids=["alone", "checkpointing"])
def test_a_run_is_that_of_the_plain_module(others, caplog):
    plain, tiled = train([]), train([TiledCompute(["*norm*", "*.up", "*.down"], tile_tokens=8), *others])
    torch.testing.assert_close(torch.tensor(tiled.losses), torch.tensor(plain.losses), rtol=0, atol=1e-12)
    for expected, found in zip(plain.parameters(), tiled.parameters()):
        torch.testing.assert_close(found, expected, rtol=0, atol=WEIGHTS)
    assert list(tiled.state_dict()) == list(plain.state_dict())
    assert not tile_counts(tiled), "tiles were left behind"
    assert "run 5 LayerNorm, 4 Linear in tiles of 8 tokens" in caplog.text


def test_adapters_inside_a_tile_are_trained():
    module = LitLM().double()
    made = make_trainer(callbacks=[LoRA(modules=["*.up", "*.down"]), TiledCompute(["*.up", "*.down"], tile_tokens=8)])
    made.fit(module, make_loader(num_tokens=33))
    trained = {name: p for name, p in module.named_parameters() if "lora_B" in name}
    assert len(trained) == 4
    assert all(float(p.detach().abs().max()) > 0 for p in trained.values())


def test_a_tile_longer_than_the_text_is_said():
    with pytest.warns(UserWarning, match="inactive: the first batch has 15 tokens and a tile has 4096"):
        make_trainer(callbacks=[TiledCompute(["*norm*"])]).fit(LitLM(), make_loader())


def test_bad_arguments_are_listed_together():
    with pytest.raises(ConfigurationError) as error:
        TiledCompute("auto", tile_tokens=0)
    assert "which modules are position-wise is not guessed" in str(error.value)
    assert "tile_tokens=0 must be an int of 1 or more" in str(error.value)
    with pytest.raises(ConfigurationError, match="selects nothing"):
        TiledCompute([])
    with pytest.raises(NothingToTransformError, match=r"modules='\*attention\*' matched none"):
        make_trainer(callbacks=[TiledCompute("*attention*")]).fit(LitLM(), make_loader())


def test_a_module_that_mixes_positions_ends_the_run_by_name():
    with pytest.raises(ConfigurationError, match=r"'net.blocks.0' mixes positions"):
        make_trainer(callbacks=[TiledCompute(["*.blocks.*"], tile_tokens=4)]).fit(LitLM(), make_loader())


def test_it_works_without_a_trainer():
    module = LitLM().double()
    ids = torch.arange(40)[None] % 64
    expected = module.net(ids)
    applied = apply(module, [TiledCompute(["*norm*"], tile_tokens=8)])
    torch.testing.assert_close(module.net(ids), expected, rtol=0, atol=1e-12)
    applied.undo()
    assert not tile_counts(module)
