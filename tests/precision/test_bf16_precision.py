"""BF16Precision in real runs of both namespaces."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning  # noqa: TID251  (both namespaces are under test)
import torch
import torch.nn.functional as F
import yaml
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.cli import LightningCLI
from packaging.version import Version
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_memsave import (
    ActivationCheckpointing,
    BF16Precision,
    EarlyZeroGrad,
    GradientRelease,
    LoRA,
    LowMemoryOptimizer,
)
from lightning_memsave.callbacks._session import Session
from lightning_memsave.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    IncompatibleMethodsError,
    NothingToTransformError,
)
from lightning_memsave.optim.split_weights import correction_of, join
from lightning_memsave.optim.state_bytes import held_state_bytes

WAYS = ["stochastic", "split", "kahan"]
NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]


class Lines(pl.Callback, pytorch_lightning.Callback):
    """Keep what the session reported, and the dtypes and shapes of gradients."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
        if grads:
            self.norms.append(torch.stack(grads).norm().item())

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        session = Session.find(trainer)
        self.lines = [line for name, line in session.lines if name == "BF16Precision"] if session else []


def fit(module: Any, plugin: Any, *callbacks: Any, ckpt_path: Any = None, namespace: Any = pl, **options: Any) -> Any:
    trainer = make_trainer(namespace, plugins=[plugin], callbacks=[*callbacks], **options)
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


def in_namespace(name: str) -> Any:
    """Return LitLM as a module of a namespace."""
    base = importlib.import_module(name).LightningModule
    if name == NAMESPACES[0]:
        return LitLM
    methods = {key: value for key, value in vars(LitLM).items() if key[:2] != "__"}
    return type("LitLM", (base,), {**methods, "__init__": _init})


def _init(self: Any, build_in: str = "init", lr: float = 1e-3, **network: Any) -> None:
    pytorch_lightning.LightningModule.__init__(self)
    self.build_in, self.lr, self.network, self.losses = build_in, lr, network, []
    self._build()


def values(trainer: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return weights, joined with their corrections where there are some."""
    [optimizer] = trainer.optimizers
    found = {}
    for name, p in module.named_parameters():
        rest = optimizer.state.get(p, {}).get("correction")
        found[name] = p.detach().float() if rest is None else join(p.detach(), rest)
    return found


# -- what it does ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("build_in", "namespace"), [("init", NAMESPACES[0]), ("init", NAMESPACES[1]), ("configure_model", NAMESPACES[0])]
)
def test_any_module_trains_and_says_what_was_cast(build_in, namespace, way) -> None:
    module, seen = in_namespace(namespace)(build_in=build_in), Lines()
    trainer = fit(module, BF16Precision(way), seen, namespace=importlib.import_module(namespace), max_epochs=3)
    assert trainer.precision == "bf16-true"
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for p in module.parameters():
        assert p.dtype == (torch.float32 if id(p) in norms else torch.bfloat16)
    [cast, step] = seen.lines
    assert "18 trainable and 0 frozen tensors cast to bf16; 5 modules kept fp32 (net.blocks.0.norm1" in cast
    assert "weights 421.00 KiB -> 211.75 KiB" in cast
    assert ("104.62 KiB of corrections" in cast) == (way == "split")
    assert step == f"AdamW steps fp32 copies of bf16 weights ({way})"
    [optimizer] = trainer.optimizers
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith("exp_avg")]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert "step" not in optimizer.__dict__, "the step is given back"


def test_the_correction_is_made_of_the_fp32_values() -> None:
    module = LitLM()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = make_trainer(plugins=[BF16Precision("split")], max_epochs=1)
    trainer.validate(module, make_loader())
    for name, p in module.named_parameters():
        if p.dtype == torch.bfloat16:
            # 129 / 2 ** 23
            torch.testing.assert_close(join(p.detach(), correction_of(p)), before[name], rtol=1.54e-5, atol=0)


def test_adamw_split_master_takes_the_corrections_over() -> None:
    module, seen = LitLM(), Lines()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(
        module, BF16Precision("split"), LowMemoryOptimizer("adamw_split_master", keep_32bit=[]), seen, max_epochs=1
    )
    [optimizer] = trainer.optimizers
    assert type(optimizer).__name__ == "SplitMasterAdamW"
    assert optimizer.num_drawn == 0
    assert seen.lines[1] == "SplitMasterAdamW steps the split weights itself"
    for name, value in values(trainer, module).items():
        # three steps of 1e-3
        assert (value - before[name]).abs().max() < 5e-3
    matrix = module.net.blocks[0].up.weight
    held = sum(v.nbytes for v in optimizer.state[matrix].values() if isinstance(v, Tensor)) + matrix.nbytes
    assert held / matrix.numel() == 5 + 8 / 256
    assert held_state_bytes(optimizer) > 0


def test_corrections_that_nobody_kept_are_said_to_be_drawn(caplog) -> None:
    make_trainer(callbacks=[LowMemoryOptimizer("adamw_split_master")], precision="bf16-true").fit(
        LitLM(), make_loader()
    )
    assert "the fp32 values of 28 of 28 bf16 tensors are not known, so their corrections are drawn" in caplog.text
    caplog.clear()
    fit(LitLM(), BF16Precision("split"), LowMemoryOptimizer("adamw_split_master"))
    assert "not known" not in caplog.text


def test_weights_of_a_bf16_file_are_drawn_from_their_cells_and_it_is_said() -> None:
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.bfloat16).float()):
        module, seen = cast(LitLM()), Lines()
        fit(module, BF16Precision("split", keep_fp32=[]), seen)
        assert re.search(r"the fp32 values of 28 tensors are not known \(bf16 already\).*drawn", seen.lines[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "lion_8bit", "adamw_fp8"])
def test_low_memory_optimizers_step_through_fp32_copies(name, way) -> None:
    module = LitLM(lr=1e-3 if name != "adafactor" else 1e-2)
    fit(module, BF16Precision(way), LowMemoryOptimizer(name), max_epochs=3)
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_updates_far_below_a_spacing_are_kept_by_each_way_and_lost_by_bf16_true() -> None:
    # SGD moves a weight of 0.5 by 1e-4 a step; its spacing is 2e-3
    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((256,), 0.5))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    moved = {}
    for way in ("bf16-true", *WAYS):
        module = Lit()
        how = {"precision": way} if way == "bf16-true" else {"plugins": [BF16Precision(way)]}
        make_trainer(max_epochs=40, **how).fit(module, make_loader())
        moved[way] = 0.5 - module.weight.detach().float().mean().item()
    assert moved.pop("bf16-true") == 0.0
    for way, distance in moved.items():
        # 120 steps; the weights show whole spacings (stochastic: on average, standard deviation 1e-3)
        assert distance == pytest.approx(120 * 1e-4, abs=3e-3), way


# -- Lightning around it -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_gradients_are_clipped_in_either_namespace(namespace, algorithm) -> None:
    norms = {}
    for clip in (None, 1e-3):
        module, seen = in_namespace(namespace)(), Lines()
        fit(
            module,
            BF16Precision("split"),
            seen,
            namespace=importlib.import_module(namespace),
            gradient_clip_val=clip,
            gradient_clip_algorithm=algorithm,
        )
        norms[clip] = seen.norms
    assert min(norms[None]) > 0.1
    assert max(norms[1e-3]) < (1.01e-3 if algorithm == "norm" else 0.5)


class Scheduled(LitLM):
    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 5e-4}],
            lr=self.lr,
        )
        schedule = OneCycleLR(optimizer, max_lr=[3e-3, 1e-3], total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


CASES = [
    ("stochastic", None),
    ("split", None),
    ("kahan", None),
    ("split", "adamw_split_master"),
    ("stochastic", "adamw_8bit"),
    ("split", "adamw_8bit"),
    ("split", "adafactor"),
]


JOINED = [(way, name, "float32") for way, name in CASES if way != "stochastic"]


@pytest.mark.parametrize(("way", "name", "checkpoint_dtype"), [*((*case, None) for case in CASES), *JOINED])
def test_resume_is_bit_exact_with_groups_schedules_clipping_and_accumulation(
    way, name, checkpoint_dtype, tmp_path
) -> None:
    options: dict[str, Any] = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}

    def callbacks() -> list[Any]:
        return [LowMemoryOptimizer(name, **({} if name == "adafactor" else {"keep_32bit": []}))] if name else []

    def plugin() -> BF16Precision:
        return BF16Precision(way, checkpoint_dtype=checkpoint_dtype)

    straight = Scheduled(dropout=0.0)
    fit(straight, plugin(), *callbacks(), max_epochs=4, **options)
    half = Scheduled()
    trainer = fit(half, plugin(), *callbacks(), max_epochs=2, **options)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    dtypes = {value.dtype for key, value in saved["state_dict"].items() if "norm" not in key}
    assert dtypes == {torch.float32 if checkpoint_dtype else torch.bfloat16}

    resumed = Scheduled()
    torch.manual_seed(5)
    trainer = fit(resumed, plugin(), *callbacks(), ckpt_path=path, max_epochs=4, **options)
    assert resumed.losses == straight.losses[6:]
    for (key, p), q in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), key


def test_checkpoints_of_joined_weights_hold_what_training_holds(tmp_path) -> None:
    module = LitLM()
    trainer = fit(module, BF16Precision("split", checkpoint_dtype="float32"), max_epochs=2)
    for only in (False, True):
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=only)
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        for name, value in values(trainer, module).items():
            assert torch.equal(state[name], value)
    plain = LitLM()
    plain.load_state_dict(state)
    assert all(torch.equal(p.to(q.dtype), q) for p, q in zip(plain.parameters(), module.parameters()))


def test_a_second_fit_goes_on_from_the_masters() -> None:
    module = LitLM(lr=0.0)
    first = values(fit(module, BF16Precision("split")), module)
    second = values(fit(module, BF16Precision("split")), module)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((value != p.detach().float()).any() for value, p in zip(first.values(), module.parameters()))


def test_validation_and_prediction_run_on_the_cast_module() -> None:
    module = LitLM()
    plugin = BF16Precision("split")
    trainer = make_trainer(plugins=[plugin])
    trainer.fit(module, make_loader(), make_loader())
    trainer.validate(module, make_loader())
    [output, *_] = trainer.predict(module, make_loader())
    assert output.dtype == torch.bfloat16
    hooks = [len(m._forward_pre_hooks) for m in module.modules() if isinstance(m, nn.LayerNorm)]
    assert set(hooks) == {1}, "casting again adds no hook"
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", [None, "adamw_split_master", "adamw_8bit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_can_be_released(name, accumulate) -> None:
    module = LitLM()
    callbacks = [LowMemoryOptimizer(name)] if name else []
    release = GradientRelease(clip="two_pass", accumulate="host" if accumulate > 1 else "refuse")
    fit(
        module,
        BF16Precision("split"),
        *callbacks,
        release,
        max_epochs=4,
        gradient_clip_val=1.0,
        accumulate_grad_batches=accumulate,
    )
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_manual_optimization_with_two_optimizers() -> None:
    class Manual(LitLM):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            self.losses.append(loss.item())

        def configure_optimizers(self) -> Any:
            blocks = list(self.net.blocks.parameters())
            rest = [p for p in self.parameters() if all(p is not b for b in blocks)]
            return [torch.optim.AdamW(blocks, lr=1e-3), torch.optim.SGD(rest, lr=0.1)]

    module = Manual()
    fit(module, BF16Precision("split"), max_epochs=3)
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def test_methods_beside_it(tmp_path) -> None:
    module = LitLM(tied=True)
    fit(module, BF16Precision("split"), ActivationCheckpointing(), EarlyZeroGrad(), max_epochs=3)
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    assert module.net.head.weight is module.net.embedding.weight


def test_adapters_stay_fp32_and_the_frozen_base_becomes_bf16() -> None:
    module, seen = LitLM(), Lines()
    fit(module, BF16Precision("split"), LoRA(rank=4), seen, max_epochs=3)
    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    assert adapters
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapters.values())
    base = {p.dtype for name, p in module.named_parameters() if "base_layer" in name}
    assert base == {torch.bfloat16}
    assert "no effect on training: no trainable tensor is bf16" in seen.lines[0]
    assert sum(module.losses[-3:]) < sum(module.losses[:3])


def _train_on_two_ranks(rank: int, way: str, name: str | None, strategy: str) -> tuple[list[float], list[Tensor]]:
    module = LitLM()
    callbacks = [LowMemoryOptimizer(name)] if name else []
    plugins = [BF16Precision(way)]
    trainer = make_trainer(plugins=plugins, callbacks=callbacks, devices=2, strategy=strategy, max_epochs=2)
    trainer.fit(module, make_loader())
    return module.losses, [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("strategy", ["ddp", "memsave_ddp"])
@pytest.mark.parametrize(("way", "name"), [("stochastic", None), ("split", None), ("split", "adamw_split_master")])
def test_replicas_stay_equal_under_data_parallel(ranks, way, name, strategy) -> None:
    (losses, first), (other, second) = ranks(_train_on_two_ranks, way, name, strategy)
    assert losses != other, "the ranks saw the same batches"
    assert all(torch.equal(p, q) for p, q in zip(first, second))


# -- arguments, YAML, refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "fp32"}, r"weights='fp32'\. Write 'stochastic', 'split' or 'kahan'"),
        ({"keep_fp32": [""]}, "keep_fp32=.* selects no modules"),
        ({"keep_fp32": 3}, "keep_fp32=3 selects no modules"),
        ({"correction": "int4"}, 'Write "int8" or "int16"'),
        ({"correction": "int16"}, "goes with weights=\"split\"; found weights='stochastic'"),
        ({"checkpoint_dtype": "float16"}, 'Write "float32" for joined weights'),
        ({"checkpoint_dtype": "float32"}, "stochastic weights are bf16 and nothing more"),
    ],
)
def test_wrong_arguments_say_what_to_write(arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BF16Precision(**arguments)
    with pytest.raises(ConfigurationError, match=r"(?s)weights=1.*correction=2"):
        BF16Precision(1, correction=2)


@pytest.mark.skipif(Version(pl.__version__) < Version("2.6"), reason="Lightning 2.5 refuses it in its own words")
def test_among_the_callbacks_it_says_where_it_belongs() -> None:
    with pytest.raises(ConfigurationError, match=r"not a callback.*Write Trainer\(plugins=\[BF16Precision\("):
        make_trainer(callbacks=[BF16Precision("split")])


def test_a_pattern_that_matches_nothing_is_refused_and_the_default_is_not() -> None:
    with pytest.raises(NothingToTransformError, match=r"keep_fp32='\*\.rotor' matched none"):
        fit(LitLM(), BF16Precision(keep_fp32=["*norm*", "*.rotor"]))

    class NoNorm(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(15, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(torch.ones(2, 15)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fit(NoNorm(), BF16Precision())


@pytest.mark.parametrize("way", ["stochastic", "kahan"])
def test_another_way_than_that_of_the_optimizer_is_refused(way) -> None:
    with pytest.raises(ConfigurationError, match=r"adamw_split_master keeps split weights.*BF16Precision\(\"split\"\)"):
        fit(LitLM(), BF16Precision(way), LowMemoryOptimizer("adamw_split_master"))


def test_another_correction_than_that_of_the_optimizer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"keeps torch.int8 corrections, and BF16Precision made torch.int16"):
        fit(LitLM(), BF16Precision("split", correction="int16"), LowMemoryOptimizer("adamw_split_master"))
    optimizer = LowMemoryOptimizer("adamw_split_master", options={"correction": "int16"})
    fit(LitLM(), BF16Precision("split", correction="int16"), optimizer)


def test_fp32_weights_are_refused_by_the_optimizer_alone() -> None:
    with pytest.raises(ConfigurationError, match=r"trains bf16 weights.*BF16Precision\(\"split\"\)"):
        make_trainer(callbacks=[LowMemoryOptimizer("adamw_split_master")]).fit(LitLM(), make_loader())


def test_an_optimizer_that_needs_all_parameters_is_refused() -> None:
    class Search(LitLM):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="LBFGS cannot step bf16 weights"):
        fit(Search(), BF16Precision())


@pytest.mark.parametrize("savers", [[], [LowMemoryOptimizer("adamw_split_master")]], ids=["adamw", "split_master"])
@pytest.mark.parametrize("way", ["kahan", "stochastic"])
def test_a_checkpoint_of_another_way_is_refused(tmp_path, way, savers) -> None:
    trainer = fit(LitLM(), BF16Precision("split"), *savers)
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    with pytest.raises(CheckpointMismatchError, match="kept with correction"):
        fit(LitLM(), BF16Precision(way), ckpt_path=tmp_path / "split.ckpt", max_epochs=2)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "deepspeed"])
def test_strategies_that_shard_are_refused_before_the_cast(kind, monkeypatch) -> None:
    monkeypatch.setattr("lightning_memsave.callbacks._session.strategy_kind", lambda strategy: kind)
    module = LitLM()
    with pytest.raises(IncompatibleMethodsError, match=f"BF16Precision does not run on the '{kind}' strategy"):
        fit(module, BF16Precision())
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_it_is_written_in_yaml_and_shown_as_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = {
        "class_path": "lightning_memsave.BF16Precision",
        "init_args": {"weights": "kahan", "keep_fp32": ["*.head"]},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"plugins": [plugin], "accelerator": "cpu", "logger": False}}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(file)])
    cli = LightningCLI(LitLM, run=False, seed_everything_default=0)
    assert repr(cli.trainer.precision_plugin) == "BF16Precision(weights='kahan', keep_fp32=['*.head'])"


def test_a_run_without_callbacks_leaves_no_session_behind() -> None:
    trainer = fit(LitLM(), BF16Precision())
    assert Session.find(trainer) is None


def test_the_users_random_numbers_are_left_alone() -> None:
    drawn = []
    for plugins in ([], [BF16Precision("stochastic")], [BF16Precision("split")]):
        module = LitLM()
        torch.manual_seed(3)
        make_trainer(plugins=plugins).fit(module, make_loader())
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


# -- convergence -------------------------------------------------------------------------------------------------------
class Classifier(pl.LightningModule):
    """A table of tokens to learn, with steps below the spacing of bf16: pure bf16 weights lag far behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Embedding(500, 128),
            nn.Linear(128, 512),
            nn.GELU(),
            nn.Linear(512, 128),
            nn.LayerNorm(128),
            nn.Linear(128, 500),
        )
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        ids, labels = batch[0].long(), batch[1].long()
        loss = F.cross_entropy(self.net(ids[0]).float(), labels[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)


def classify(**options: Any) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 500, (400, 64), generator=generator)
    table = torch.randint(0, 500, (500,), generator=generator)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, table[ids]), batch_size=1)
    module = Classifier()
    make_trainer(**options).fit(module, loader)
    return module.losses


@pytest.mark.slow
def test_losses_follow_fp32_adamw_in_every_way() -> None:
    reference = classify()

    def worst(losses: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, reference))

    assert worst(classify(precision="bf16-true")) > 0.5  # seen: 0.99; bf16-mixed 0.0021
    found = {way: worst(classify(plugins=[BF16Precision(way)])) for way in WAYS}
    split_master = [LowMemoryOptimizer("adamw_split_master", keep_32bit=[])]
    found["adamw_split_master"] = worst(classify(plugins=[BF16Precision("split")], callbacks=split_master))
    # worst seen: stochastic 0.0078, split 0.0028, kahan 0.0022, adamw_split_master 0.0026
    limits = {"stochastic": 0.02, "split": 0.008, "kahan": 0.008, "adamw_split_master": 0.008}
    assert all(found[way] < limit for way, limit in limits.items()), found
