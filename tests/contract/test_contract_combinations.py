"""Methods next to each other, under every precision of the Trainer, and with parts of the model frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memsave import ActivationCheckpointing, AdapterCheckpoint
from lightning_memsave.errors import MemsaveError

from .harness import assert_equal, assert_same_state, fit, outcome, plain, run, trainer_for
from .kinds import KINDS, build
from .methods import EXACT, METHODS, OTHERS, combinations, exact_set, make

PRECISIONS = ("bf16-mixed", "bf16-true")


# -- with each other ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kind"), combinations(OTHERS, ["dropout", "gan", "vision", "hf_llama", "hf_bert"]))
def test_exact_methods_stay_exact_next_to_another(name: str, kind: str) -> None:
    found, expected = run(kind, [*exact_set(kind, name), make(name, kind)]), run(kind, [make(name, kind)])
    assert found.losses == expected.losses
    assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_finds_the_repeated_blocks_of_every_kind(kind: str) -> None:
    assert_equal(run(kind, [ActivationCheckpointing()]), plain(kind))


# -- under the Trainer's precision ----------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["language", "vision"])
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_method_is_exact_under_every_precision(name: str, kind: str, precision: str) -> None:
    found = run(kind, [make(name, kind)], precision=precision)
    assert_equal(found, run(kind, precision=precision))
    assert found.losses != plain(kind).losses, "the precision must have had an effect"


@pytest.mark.filterwarnings("ignore:.*leaves .* of the 16-bit weights unchanged.*")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_another_method_trains_under_every_precision(name: str, precision: str) -> None:
    module, _ = fit("language", [make(name, "language")], precision=precision)
    assert torch.tensor(module.losses).isfinite().all()
    assert module.losses[-1] < module.losses[0]
    adapters = {p.dtype for n, p in module.named_parameters() if p.requires_grad and "lora" in n}
    assert adapters <= {torch.float32}, "adapters keep fp32 weights to step on"


# -- with a frozen part ---------------------------------------------------------------------------------------------
def test_adapter_checkpoint_changes_no_bit_of_training() -> None:
    # the encoder is frozen at first and unfrozen in the second epoch
    found = run("autoencoder", [AdapterCheckpoint()])
    assert found.losses == plain("autoencoder").losses
    assert_same_state(found.state, plain("autoencoder").state)
    with pytest.raises(MemsaveError, match="all parameters of TabularModule are trainable"):
        run("tabular", [AdapterCheckpoint()])


@pytest.mark.parametrize(("name", "_"), combinations(METHODS, ["autoencoder"]))
def test_an_encoder_unfrozen_in_training_is_trained(name: str, _: str) -> None:
    before = dict(build("autoencoder").encoder.named_parameters())
    module, _ = fit("autoencoder", [make(name, "autoencoder")])
    after = {n.replace(".base_layer", ""): p for n, p in module.encoder.named_parameters() if p.is_floating_point()}
    changed = {n for n, p in before.items() if n in after and not torch.equal(p, after[n])}
    # a quantized weight cannot train; what is left of the encoder does
    assert changed == {n for n in before if name != "QLoRA" or n.endswith("bias")}
    assert all("lora_B" not in n or p.any() for n, p in after.items()), "its adapters are trained, too"


def test_a_checkpoint_after_the_encoder_is_unfrozen_holds_the_encoder(tmp_path: Path) -> None:
    def keys(epochs: int) -> Any:
        module = build("autoencoder")
        trainer = trainer_for("autoencoder", [AdapterCheckpoint()], max_epochs=epochs)
        trainer.fit(module, KINDS["autoencoder"].batches())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        return outcome(module, trainer).state, saved

    _, frozen = keys(1)
    assert {key.split(".")[0] for key in frozen} == {"decoder"}
    state, unfrozen = keys(2)
    assert_same_state(unfrozen, state)
