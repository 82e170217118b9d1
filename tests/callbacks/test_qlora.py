"""QLoRA in a Trainer: the two halves, precisions, checkpoints, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memsave import (
    ActivationCheckpointing,
    EarlyZeroGrad,
    LoRA,
    LowMemoryOptimizer,
    QLoRA,
    WeightQuantization,
    apply,
)
from lightning_memsave.errors import ConfigurationError, IncompatibleMethodsError

KINDS = ("nf4", "fp4", "int8")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


def fit(savers: list[Any], module: LitLM | None = None, **trainer: Any) -> LitLM:
    module = module or LitLM(lr=1e-2)
    torch.manual_seed(1)
    make_trainer(callbacks=savers, **{"max_epochs": 2, **trainer}).fit(module, make_loader(), make_loader())
    return module


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_on_codes_that_never_change(kind: str, precision: str) -> None:
    module = LitLM(lr=1e-2)
    apply(module, [QLoRA(rank=4, kind=kind)])
    codes = {n: p.clone() for n, p in module.named_parameters() if not p.is_floating_point()}
    assert len(codes) == 12
    fit([QLoRA(rank=4, kind=kind)], module, precision=precision)
    assert all(torch.equal(module.get_parameter(name), value) for name, value in codes.items())
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert sum(module.losses[3:]) < sum(module.losses[:3])


def test_it_is_weight_quantization_and_lora() -> None:
    both = fit([WeightQuantization("nf4"), LoRA(rank=4)])
    one = fit([QLoRA(rank=4)])
    assert one.losses == both.losses
    assert one.state_dict().keys() == both.state_dict().keys()


@pytest.mark.parametrize("build_in", ["init", "setup", "configure_model"])
def test_the_model_may_be_built_anywhere(build_in: str) -> None:
    module = fit([QLoRA(rank=4)], LitLM(build_in, lr=1e-2))
    assert sum(p.dtype == torch.uint8 for p in module.parameters()) == 12
    assert sum(p.requires_grad for p in module.parameters()) == 24


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_runs_with_the_savers_of_its_preset(precision: str) -> None:
    module = fit(
        [EarlyZeroGrad(), LowMemoryOptimizer(), ActivationCheckpointing(), QLoRA(rank=4, frozen_dtype="bf16")],
        precision=precision,
    )
    assert sum(module.losses[3:]) < sum(module.losses[:3])


def test_neither_embeddings_nor_head_are_cast_up() -> None:
    module = LitLM()
    module.net.bfloat16()
    apply(module, [QLoRA(rank=4)])
    assert {p.dtype for n, p in module.named_parameters() if "lora_" not in n} == {torch.uint8, torch.bfloat16}


def test_bytes_are_reported_before_and_after() -> None:
    module = LitLM()
    (_, weights), (_, adapters) = apply(module, [QLoRA(rank=4)])
    # 8 of 64 x 64 and 4 of 64 x 256 values: codes, scales of one byte, one fp32 scale of scales, offset and table
    assert weights.bytes_before == 4 * (8 * 4096 + 4 * 16384)
    assert weights.bytes_after == 8 * (2048 + 64 + 4 + 68) + 4 * (8192 + 256 + 4 + 68)
    assert adapters.bytes_after - adapters.bytes_before == 4 * 4 * (8 * 128 + 4 * 320)


def test_resume_is_bitwise(tmp_path: Path) -> None:
    whole = fit([QLoRA(rank=4)])
    saved = ModelCheckpoint(tmp_path, filename="{epoch}")
    first = fit([QLoRA(rank=4), saved], max_epochs=1, enable_checkpointing=True)
    second = LitLM(lr=1e-2)
    trainer = make_trainer(callbacks=[QLoRA(rank=4), saved], max_epochs=2, enable_checkpointing=True)
    trainer.fit(second, make_loader(), make_loader(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert first.losses + second.losses == whole.losses
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_several_runs_on_one_module_quantize_once() -> None:
    module = LitLM(lr=1e-2)
    trainer = make_trainer(callbacks=[QLoRA(rank=4)], max_epochs=1)
    trainer.validate(module, make_loader(), verbose=False)
    trainer.fit(module, make_loader(), make_loader())
    trainer.test(module, make_loader(), verbose=False)
    other = copy.deepcopy(module)
    make_trainer(callbacks=[QLoRA(rank=4)]).fit(other, make_loader())
    assert sum(p.dtype == torch.uint8 for p in other.parameters()) == 12
    assert sum(p.requires_grad for p in other.parameters()) == 24


def test_undo_gives_the_plain_module_back() -> None:
    module = LitLM()
    keys = list(module.state_dict())
    apply(module, [QLoRA(rank=4, frozen_dtype="bf16")]).undo()
    assert list(module.state_dict()) == keys
    assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float32, True)}
    assert "_memsave_applied" not in vars(module)


def test_a_trained_head_is_neither_quantized_nor_frozen() -> None:
    module = LitLM(lr=1e-2)
    fit([QLoRA(rank=4, train="net.blocks.1.down")], module)
    assert module.net.blocks[1].down.weight.requires_grad
    assert sum(p.dtype == torch.uint8 for p in module.parameters()) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "kind": "nf3"}, r"(?s)rank=0 must be.*kind='nf3' is not one of.*did you mean 'nf4'"),
        ({"dropout": 1}, "dropout=1 must be a probability"),
        ({"frozen_dtype": "int8"}, "frozen_dtype='int8' is not one of"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QLoRA(**arguments)


@pytest.mark.parametrize("other", [LoRA(), WeightQuantization()])
def test_its_own_halves_are_refused_beside_it(other: Any) -> None:
    module = LitLM()
    with pytest.raises(IncompatibleMethodsError, match="QLoRA already"):
        fit([QLoRA(), other], module)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
