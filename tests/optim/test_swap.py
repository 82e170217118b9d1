"""Optimizers are exchanged in any returned form, with their groups, schedulers and hooks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from helpers import TinyLM
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_memsave._imports import require
from lightning_memsave.errors import ConfigurationError, NothingToTransformError
from lightning_memsave.optim.adafactor import Adafactor
from lightning_memsave.optim.registry import OPTIMIZERS, family_of, name_problems, option_problems
from lightning_memsave.optim.swap import parameters_kept_32bit, swap_optimizers

BF16_WEIGHTS = "adamw_split_master"  # tests/optim/test_split_master.py swaps it in
NAMES = [name for name in OPTIMIZERS if name != BF16_WEIGHTS]


def swap(configured: Any, module: nn.Module, name: str = "adamw_8bit", keep_32bit: Any = "auto", **options: Any):
    return swap_optimizers(configured, module, OPTIMIZERS[name], options=options, keep_32bit=keep_32bit)


def swapped(old: torch.optim.Optimizer, module: nn.Module | None = None, name: str = "adamw_8bit", **options: Any):
    new, _ = swap(old, module or nn.Module(), name, **options)
    return new


def adamw(module: nn.Module, cls: Any = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "lr": 1e-3, "weight_decay": 0.1, "name": "matrices"},
        {"params": vectors, "lr": 5e-4, "weight_decay": 0.0, "name": "vectors"},
    ]
    return cls(groups, **options)


# -- forms -------------------------------------------------------------------------------------------------------------
FORMS = {
    "one": lambda a, b, s, e: a,
    "list": lambda a, b, s, e: [a, b],
    "tuple": lambda a, b, s, e: (a, b),
    "lists": lambda a, b, s, e: ([a, b], [s, e]),
    "dict": lambda a, b, s, e: {"optimizer": a, "lr_scheduler": s, "monitor": "loss"},
    "dict of dict": lambda a, b, s, e: {"optimizer": b, "lr_scheduler": e},
    "dicts": lambda a, b, s, e: ({"optimizer": a, "lr_scheduler": s, "frequency": 2}, {"optimizer": b}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_its_shape(form) -> None:
    module = nn.Linear(4, 4)
    first, second = adamw(module), adamw(module)
    schedule, entry_schedule = ExponentialLR(first, 0.9), ExponentialLR(second, 0.9)
    entry = {"scheduler": entry_schedule, "interval": "step", "frequency": 3, "monitor": "x"}
    replaced, swaps = swap(FORMS[form](first, second, schedule, entry), module)
    new = {id(s.old): s.new for s in swaps}
    assert replaced == FORMS[form](new.get(id(first)), new.get(id(second)), schedule, entry)
    assert all(type(s.new).__name__ == "AdamW8bit" for s in swaps)
    text = repr(FORMS[form]("FIRST", "SECOND", "SCHEDULE", "ENTRY"))
    if "SCHEDULE" in text:
        assert schedule.optimizer is new[id(first)]
    if "ENTRY" in text:
        assert entry_schedule.optimizer is new[id(second)]


def test_one_optimizer_that_appears_twice_stays_one() -> None:
    old = adamw(nn.Linear(2, 2))
    (first, second), swaps = swap([old, old], nn.Module())
    assert first is second
    assert len(swaps) == 1


@pytest.mark.parametrize("configured", [None, [], {"lr_scheduler": None}, "adamw"])
def test_no_optimizer_is_refused(configured) -> None:
    with pytest.raises(ConfigurationError, match=r"no torch\.optim\.Optimizer in it"):
        swap(configured, nn.Module())


def test_an_attribute_that_holds_the_old_optimizer_holds_the_new_one() -> None:
    module = nn.Module()
    module.linear = nn.Linear(2, 2)
    old, other = adamw(module.linear), adamw(module.linear)
    module.optimizer, module.all_optimizers, module.by_name = old, [old, other], {"a": other}
    (new, new_other), _ = swap([old, other], module)
    assert module.optimizer is new
    assert module.all_optimizers == [new, new_other]
    assert module.by_name == {"a": new_other}


# -- groups ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_groups_keep_their_parameters_rates_decay_and_own_keys(name) -> None:
    module = TinyLM()
    old = adamw(module)
    new = swapped(old, module, name)
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        assert all(a is b for a, b in zip(before["params"], after["params"], strict=True))
        assert {k: after[k] for k in ("lr", "weight_decay", "name")} == {
            k: before[k] for k in ("lr", "weight_decay", "name")
        }
        assert before["params"] is not after["params"]


def test_hyper_parameters_of_the_same_meaning_are_kept() -> None:
    old = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=3e-4, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    group = swapped(old).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-6, 0.3)


def test_hyper_parameters_of_another_meaning_are_not() -> None:
    old = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], betas=(0.8, 0.95), eps=1e-6)
    assert swapped(old, name="lion").param_groups[0]["betas"] == (0.9, 0.99)
    assert swapped(old, name="adafactor").param_groups[0]["eps"] == (1e-30, 1e-3)
    assert swapped(old, name="came").param_groups[0]["betas"] == (0.9, 0.999, 0.9999)


def test_another_adafactor_keeps_what_its_options_mean() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    names = ("eps", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "weight_decay")
    torchs = torch.optim.Adafactor([p], lr=0.02, beta2_decay=-0.7, eps=(None, 1e-2), d=2.0, weight_decay=0.3)
    new, [one] = swap(torchs, nn.Module(), "adafactor")
    assert type(new) is Adafactor
    assert [new.param_groups[0][name] for name in names] == [(1e-30, 1e-2), 2.0, -0.7, None, True, 0.3]
    assert "another update rule" not in "; ".join(one.notes)
    theirs = require("transformers.optimization", "this test").Adafactor(
        [p], lr=0.02, relative_step=False, scale_parameter=False, beta1=0.9, clip_threshold=3.0
    )
    group = swapped(theirs, name="adafactor").param_groups[0]
    assert [group[name] for name in names] == [(1e-30, 1e-3), 3.0, -0.8, 0.9, False, 0.0]
    group = swapped(theirs, name="adalomo").param_groups[0]
    assert [group[name] for name in names] == [(1e-30, 1e-3), 3.0, -0.8, None, True, 0.0]


def test_muon_takes_the_betas_of_adam_and_the_options_of_another_muon() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    group = swapped(torch.optim.AdamW([p], betas=(0.8, 0.95), eps=1e-6), name="muon").param_groups[0]
    assert (group["betas"], group["eps"], group["momentum"]) == ((0.8, 0.95), 1e-6, 0.95)
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    group = swapped(torch.optim.Muon([p], lr=0.1, momentum=0.8, nesterov=False), name="muon").param_groups[0]
    assert (group["momentum"], group["nesterov"], group["adjust_lr_fn"]) == (0.8, False, "original")


def test_a_key_of_the_users_own_that_is_an_option_is_refused_by_name() -> None:
    old = torch.optim.AdamW(only(scale=0.5))
    with pytest.raises(ConfigurationError, match=r"param group 0 has a key 'scale' of its own.*options=\{'scale'"):
        swapped(old, name="galore_adamw")
    assert swapped(torch.optim.AdamW(only(scale=0.5)), name="muon").param_groups[0]["scale"] == 0.5


def test_options_win_over_the_groups() -> None:
    old = adamw(nn.Linear(2, 2), betas=(0.8, 0.95))
    new = swapped(old, betas=(0.9, 0.98), weight_decay=0.2)
    assert {(g["betas"], g["weight_decay"]) for g in new.param_groups} == {((0.9, 0.98), 0.2)}


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
def test_the_step_follows_adamw(name) -> None:
    torch.manual_seed(0)
    module = nn.Linear(128, 128)
    twin = copy.deepcopy(module)
    old, new = adamw(twin), swapped(adamw(module), module, name)
    for _ in range(5):
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        old.step()
        new.step()
    worst = max((p - q).abs().max().item() for p, q in zip(module.parameters(), twin.parameters(), strict=True))
    # 5 steps of lr 1e-3; worst seen: 1.0e-3 in 8 bits, 6e-8 in 32
    assert worst < (2e-3 if "8bit" in name else 1e-6)


# -- schedulers --------------------------------------------------------------------------------------------------------
class Warmup(LRScheduler):
    """A user's own scheduler that wraps another one and keeps a second reference to the optimizer."""

    def __init__(self, optimizer: Any, after: Any) -> None:
        self.after, self.also, self.options = after, optimizer, {"schedulers": [after]}
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * min(1.0, (self.last_epoch + 1) / 5) for base in self.base_lrs]


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
    "lambdas": lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step]),
    "one_cycle": lambda o: OneCycleLR(o, [1e-2, 5e-3], total_steps=20),
    "cyclic": lambda o: CyclicLR(o, [1e-4, 1e-4], [1e-2, 1e-3], step_size_up=3, cycle_momentum=True),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 10)], [3]),
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.9)]),
    "nested": lambda o: ChainedScheduler(
        [SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 10)], [3]), ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5),
    "own": lambda o: Warmup(o, ExponentialLR(o, 0.9)),
}


def rates(optimizer: Any, scheduler: Any, steps: int = 8) -> list[list[float]]:
    seen = []
    for index in range(steps):
        optimizer.step()
        scheduler.step(*([1.0 + index] if isinstance(scheduler, ReduceLROnPlateau) else []))
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_give_the_same_rates_as_before(kind, name) -> None:
    module = nn.Linear(8, 8)
    reference = adamw(module)
    expected = rates(reference, SCHEDULERS[kind](reference))
    old = adamw(module)
    scheduler = SCHEDULERS[kind](old)
    [new], [scheduler] = swap(([old], [scheduler]), module, name)[0]
    assert rates(new, scheduler) == expected  # a warning about the order of the steps would be an error
    assert len({id(group) for group in new.param_groups} & {id(group) for group in old.param_groups}) == 0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_nothing_of_a_scheduler_points_to_the_old_optimizer(kind) -> None:
    old = adamw(nn.Linear(8, 8))
    scheduler = SCHEDULERS[kind](old)
    (new,), _ = swap(([old], [scheduler]), nn.Module())[0]
    assert scheduler.optimizer is new
    assert not _reaches(scheduler, old)


class Follow:
    """A schedule that reads the optimizer it was given."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __call__(self, step: int) -> float:
        return _weight_decay(self.optimizer, step)

    def method(self, step: int) -> float:
        return _weight_decay(self.optimizer, step)


def _weight_decay(optimizer: Any, step: int) -> float:
    return optimizer.param_groups[0]["weight_decay"] / (step + 1)


def _closure(optimizer: Any) -> Any:
    def inner(step: int) -> float:
        return _weight_decay(optimizer, step)

    return lambda step: inner(step)


SCHEDULES = {
    "closure": _closure,
    "closure over a tuple": lambda o: (lambda pair: lambda step: _weight_decay(pair[0], step))((o, "x")),
    "closure over a list": lambda o: (lambda pair: lambda step: _weight_decay(pair[0], step))([o]),
    "default": lambda o: lambda step, o=o: _weight_decay(o, step),
    "keyword default": lambda o: lambda step, *, o=o: _weight_decay(o, step),
    "partial": lambda o: functools.partial(_weight_decay, o),
    "partial by name": lambda o: functools.partial(lambda step, o: _weight_decay(o, step), o=o),
    "partial of a closure": lambda o: functools.partial(_closure(o)),
    "callable": Follow,
    "method": lambda o: Follow(o).method,
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_that_holds_the_old_optimizer_reads_the_new_one(kind) -> None:
    old = adamw(nn.Linear(8, 8))
    scheduler = LambdaLR(old, SCHEDULES[kind](old))
    (new,), _ = swap(([old], [scheduler]), nn.Module())[0]
    new.step()
    new.param_groups[0]["weight_decay"] = 0.5  # what the user's code changes later
    scheduler.step()
    assert new.param_groups[0]["lr"] == 1e-3 * 0.5 / 2


class Scheduled(torch.optim.SGD):
    """Brings its own schedule."""

    def schedule(self, step: int) -> float:
        return 0.5**step


def test_a_schedule_that_is_a_method_of_the_old_optimizer_is_refused() -> None:
    old = Scheduled([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ConfigurationError, match=r"calls Scheduled\.schedule .* replaced by AdamW8bit"):
        swap(([old], [LambdaLR(old, old.schedule)]), nn.Module())


def test_a_variable_that_was_never_set_is_left_alone() -> None:
    old = adamw(nn.Linear(8, 8))

    def schedule(step: int) -> float:
        return 1.0 if step < 10 else later

    scheduler = LambdaLR(old, schedule)
    swap(([old], [scheduler]), nn.Module())
    with pytest.raises(NameError, match="later"):
        schedule(10)
    later = 0.5
    assert schedule(10) == later


def _reaches(value: Any, target: Any, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen
    if value is target:
        return True
    if id(value) in seen or isinstance(value, (torch.Tensor, torch.optim.Optimizer)):
        return False
    seen.add(id(value))
    items = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else []
    items += list(vars(value).values()) if isinstance(value, (LRScheduler, ReduceLROnPlateau)) else []
    return any(_reaches(item, target, seen) for item in items)


def test_step_hooks_of_the_user_move_along() -> None:
    calls: list[str] = []
    module = nn.Linear(2, 2)
    old = adamw(module)
    old.register_step_pre_hook(lambda *_: calls.append("pre"))
    old.register_step_post_hook(lambda *_: calls.append("post"))
    swapped(old).step()
    assert calls == ["pre", "post"]


# -- 32-bit state ------------------------------------------------------------------------------------------------------
class OwnRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_embeddings_and_norms_are_kept_and_what_is_tied_to_them() -> None:
    module = TinyLM(tied=True)
    module.own = OwnRMSNorm()
    kept = parameters_kept_32bit(module, "auto")
    names = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in kept}
    assert names == {
        "embedding.weight",
        "head.weight",
        "norm.weight",
        "norm.bias",
        "own.weight",
        *(f"blocks.{i}.norm{j}.{k}" for i in (0, 1) for j in (1, 2) for k in ("weight", "bias")),
    }


def test_rules_for_matrices_leave_the_heads_out_too() -> None:
    module = TinyLM()
    kept = parameters_kept_32bit(module, "auto", heads=True)
    assert kept - parameters_kept_32bit(module, "auto") == {id(module.head.weight)}


def test_patterns_choose_what_is_kept() -> None:
    module = TinyLM()
    kept = parameters_kept_32bit(module, ["head", "*.up"])
    names = {name for name, p in module.named_parameters() if id(p) in kept}
    assert names == {"head.weight", *(f"blocks.{i}.up.{k}" for i in (0, 1) for k in ("weight", "bias"))}
    assert parameters_kept_32bit(module, []) == set()


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(NothingToTransformError, match=r"LowMemoryOptimizer: keep_32bit='haed' .*'head'"):
        parameters_kept_32bit(TinyLM(), "haed")


# -- refusals ----------------------------------------------------------------------------------------------------------
def only(**group: Any) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.zeros(4, 4))], **group}]


class AdamWScheduleFree(torch.optim.SGD):
    pass


class Prodigy(torch.optim.SGD):
    pass


class SAM(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        (torch.optim.LBFGS([nn.Parameter(torch.zeros(2))]), "LBFGS cannot be replaced: it evaluates the closure"),
        (torch.optim.SparseAdam([nn.Parameter(torch.zeros(2))]), "SparseAdam cannot be replaced.*sparse gradients"),
        (AdamWScheduleFree(only(), lr=0.1), "AdamWScheduleFree cannot be replaced.*state of its own"),
        (Prodigy(only(), lr=0.1), "Prodigy cannot be replaced.*state of its own"),
        (SAM(only(), lr=0.1), "SAM cannot be replaced.*closure"),
        (torch.optim.AdamW(only(), amsgrad=True), "param group 0 asks for amsgrad=True.*Write amsgrad=False"),
        (torch.optim.AdamW(only(), maximize=True), "param group 0 asks for maximize=True.*Minimize the negative loss"),
        (torch.optim.AdamW(only(), differentiable=True), "param group 0 asks for differentiable=True"),
        (torch.optim.AdamW(only(), lr=torch.tensor(0.1), foreach=False), "param group 0 has a tensor as lr.*lr=float"),
        (torch.optim.AdamW([nn.Parameter(torch.zeros(2, dtype=torch.float64))]), "found torch.float64"),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name(old, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        swapped(old)


def test_sparse_embeddings_are_refused_by_name_before_anything_is_rebound() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True))
    old = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = ExponentialLR(old, 0.9)
    with pytest.raises(ConfigurationError, match=r"1 makes sparse gradients.*Write sparse=False"):
        swap(([old], [scheduler]), module)
    assert scheduler.optimizer is old


def test_a_missing_learning_rate_is_refused() -> None:
    old = torch.optim.AdamW(only())
    old.param_groups[0]["lr"] = None
    with pytest.raises(ConfigurationError, match="lr=None"):
        swapped(old, name="adafactor")


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)amsgrad.*maximize"):
        swapped(torch.optim.AdamW(only(), amsgrad=True, maximize=True))


def test_adafactor_honours_maximize() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    new = swapped(torch.optim.AdamW([p], maximize=True), name="adafactor")
    p.grad = torch.ones_like(p)
    new.step()
    assert (p > 1).all()


# a value that every option accepts, and one that none does
GOOD = {
    "adjust_lr_fn": "original", "beta1": None, "betas": [0.9, 0.95], "clip_threshold": 2, "correction": "int16",
    "decay_rate": -0.8, "eps": 1e-6,
    "min_8bit_size": 0, "momentum": 0.9, "nesterov": False, "ns_steps": 1, "per_channel": True, "rank": 1,
    "scale": 0.1, "scale_parameter": True, "seed": 0, "update_proj_gap": 1, "weight_decay": 0,
}  # fmt: skip
BAD = {
    "adjust_lr_fn": "adamw", "beta1": 1.0, "betas": (0.9, 1.0), "clip_threshold": 0, "correction": "int4",
    "decay_rate": 0.8, "eps": "1e-6",
    "min_8bit_size": 0.5, "momentum": 1.5, "nesterov": 1, "ns_steps": 0, "per_channel": None, "rank": 0.5, "scale": 0,
    "scale_parameter": "yes", "seed": -1, "update_proj_gap": True, "weight_decay": -1,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unknown_names_and_options_get_the_near_ones(name) -> None:
    assert name_problems(name) == []
    [problem] = name_problems(name.replace("_", "")[:-1] + "x")
    assert repr(name) in problem.split("All:")[0]
    row = OPTIMIZERS[name]
    good, bad = dict(GOOD), dict(BAD)
    if row.family in ("adafactor", "came"):
        good["eps"], bad["eps"] = [1e-30, 1e-3], 1e-8
    if row.family == "came":
        good["betas"], bad["betas"] = [0.9, 0.999, 0.9999], (0.9, 0.999)
    assert option_problems(row, {key: good[key] for key in row.options}) == []
    assert len(option_problems(row, {key: bad[key] for key in row.options})) == len(row.options)
    [unknown, rate] = option_problems(row, {"weight_decya": 1, "lr": 1})
    assert "Did you mean 'weight_decay'?" in unknown
    assert "configure_optimizers" in rate


# -- notes -------------------------------------------------------------------------------------------------------------
def notes(old: Any, name: str = "adamw_8bit", module: nn.Module | None = None, **options: Any) -> str:
    _, [one] = swap(old, module or nn.Module(), name, **options)
    return "; ".join(one.notes)


def test_another_update_rule_is_said() -> None:
    assert "another update rule than SGD" in notes(torch.optim.SGD(only(), lr=0.1))
    assert "another update rule" not in notes(torch.optim.Adam(only()))
    assert "learning rate 3 to 10 times smaller" in notes(torch.optim.AdamW(only()), "lion")
    assert "scale_parameter" in notes(torch.optim.AdamW(only()), "adafactor")
    assert "larger learning rate" in notes(torch.optim.AdamW(only()), "adalomo")
    assert "another update rule than Adam;" in notes(torch.optim.Adam(only()), "galore_adamw")
    assert "another update rule" not in notes(torch.optim.Adam(only()), "adamw_4bit")


def test_another_weight_decay_is_said() -> None:
    assert "no longer through the gradient as in Adam" in notes(torch.optim.Adam(only(), weight_decay=0.1))
    assert "weight_decay" not in notes(torch.optim.Adam(only()))
    assert "weight_decay" not in notes(torch.optim.AdamW(only(), weight_decay=0.1))


def test_a_momentum_cycle_that_nobody_reads_is_said() -> None:
    def cycled(cls: Any, **options: Any) -> Any:
        old = cls(only(), lr=0.1, **options)
        OneCycleLR(old, 0.1, total_steps=4)
        return old

    assert "momentum that the scheduler cycles has no effect" in notes(cycled(torch.optim.SGD, momentum=0.9))
    assert "momentum that the scheduler cycles has no effect" in notes(cycled(torch.optim.AdamW), "adafactor")
    assert "momentum" not in notes(cycled(torch.optim.AdamW))


def test_options_without_effect_are_said() -> None:
    small, large = nn.Parameter(torch.zeros(10, 10)), nn.Parameter(torch.zeros(400, 300))
    assert "no effect: 0 of 1 trainable tensors get 8-bit state" in notes(torch.optim.AdamW([small]))
    assert "8-bit state for 1 of 2" in notes(torch.optim.AdamW([small, large]))
    assert "paging has no effect on the CPU" in notes(torch.optim.AdamW([large]), "paged_adamw_8bit")
    on_meta = [nn.Parameter(p.to("meta")) for p in (small, large)]
    assert "1 of 2 trainable tensors are large enough to be paged" in notes(
        torch.optim.AdamW(on_meta), "paged_adamw_8bit"
    )


def test_how_many_tensors_a_rule_for_matrices_steps_is_said() -> None:
    module = TinyLM()
    told = notes(torch.optim.AdamW(module.parameters()), "muon", module)
    assert "Muon steps 12 of 28 trainable tensors, AdamW the others" in told  # not the embedding, not the head
    told = notes(torch.optim.AdamW(module.parameters()), "galore_adamw", module, rank=64)
    assert "no effect: GaLoreAdamW steps 0 of 28 trainable tensors" in told


def test_keep_32bit_without_effect_is_said() -> None:
    module = TinyLM()
    _, [one] = swap(torch.optim.AdamW(module.parameters()), module, "adafactor", keep_32bit="head")
    assert "keep_32bit has no effect" in one.notes[-1]
    _, [one] = swap(torch.optim.AdamW(module.parameters()), module, "muon", keep_32bit="head")
    assert "keep_32bit" not in one.notes[-1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_already_is_left_alone(name) -> None:
    old = swapped(torch.optim.AdamW(only()), name=name)
    new, [one] = swap(old, nn.Module(), name)
    assert new is old
    assert "left as it is" in one.notes[0]


def test_families() -> None:
    p = [nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    assert [family_of(o(p)) for o in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adafactor)] == [
        "adam",
        "adam",
        "adafactor",
    ]
    assert family_of(torch.optim.SGD(p, lr=0.1)) == "other"
    assert [family_of(row.build([{"params": p, "lr": 0.1}], {}, ())) for row in OPTIMIZERS.values()] == [
        row.family for row in OPTIMIZERS.values()
    ]
