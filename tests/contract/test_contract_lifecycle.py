"""From setup to teardown: once, in our order, undone, on any module life a project can think of."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memsave import apply

from .harness import NAMESPACES, Outcome, assert_equal, assert_same_state, fit, outcome, plain, run, traces, trainer_for
from .kinds import KINDS, PLACES, build
from .methods import (
    ADAPTERS,
    EXACT,
    METHODS,
    OTHERS,
    Counted,
    Early,
    Late,
    Persistent,
    Seed,
    combinations,
    exact_set,
    make,
)

PLACE_KINDS = ("language", "gan")


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    Counted.applied.clear()
    Counted.called.clear()


# -- where the model is built ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "kind"), combinations(EXACT, PLACE_KINDS))
def test_the_model_may_be_built_anywhere(name: str, kind: str, place: str) -> None:
    expected = plain(kind, place=place)
    assert_equal(run(kind, [make(name, kind)], place=place), expected)
    assert expected.losses == plain(kind).losses


@pytest.mark.parametrize("place", [p for p in PLACES if p != "doubled"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_place_of_the_model_does_not_change_the_result(name: str, place: str) -> None:
    # new adapters draw random numbers, from a generator that a model built later has moved on
    found = run("language", [Seed(), make(name, "language")], place=place)
    expected = run("language", [Seed(), make(name, "language")])
    assert found.losses == expected.losses
    assert_same_state(found.state, expected.state)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_transform_sees_the_finished_model_once(namespace: str, place: str) -> None:
    run("language", [Counted(["Block"])], namespace=namespace, place=place)
    assert Counted.applied == [""]
    blocks_used = 2  # the copy that setup makes is never called
    assert len(Counted.called) == blocks_used * 6


# -- once, and in our order -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_stages_decide_the_order(order: tuple[int, ...]) -> None:
    callbacks = [Early(name="early"), Counted(name="middle"), Late(name="late")]
    run("tabular", [callbacks[i] for i in order])
    assert Counted.applied == ["early", "middle", "late"]


@pytest.mark.parametrize("turn", range(len(EXACT)))
def test_the_order_of_the_users_list_does_not_matter(turn: int) -> None:
    callbacks = exact_set("dropout")
    assert_equal(run("dropout", callbacks[turn:] + callbacks[:turn]), plain("dropout"))


def test_the_order_of_a_list_with_adapters_does_not_matter() -> None:
    def callbacks() -> list[Any]:
        return [make("QLoRA", "dropout"), make("LowMemoryOptimizer", "dropout"), *exact_set("dropout")]

    expected = run("dropout", callbacks())
    for turn in (1, 3):
        found = run("dropout", [*callbacks()[turn:], *callbacks()[:turn]])
        assert found.losses == expected.losses
        assert_same_state(found.state, expected.state)
    assert run("dropout", callbacks()[::-1]).losses == expected.losses


def test_the_same_callback_twice_is_one() -> None:
    run("tabular", [Counted(name="a"), Counted(name="a")])
    assert Counted.applied == ["a"]


# -- back again -----------------------------------------------------------------------------------------------------
def _break_in_the_second_step(module: Any) -> None:
    if len(module.losses) == 2:
        raise RuntimeError("the user's own error")


def _broken(kind: str, callbacks: list[Any]) -> tuple[Any, Any]:
    module = build(kind)
    module.watch = _break_in_the_second_step
    trainer = trainer_for(kind, callbacks)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="the user's own error"):
        trainer.fit(module, KINDS[kind].batches())
    module.watch = None
    return module, trainer


@pytest.mark.parametrize(("name", "kind"), combinations([*EXACT, "LowMemoryOptimizer"], ["language", "gan"]))
def test_an_exception_in_a_step_leaves_nothing_behind(name: str, kind: str) -> None:
    module, _ = _broken(kind, [make(name, kind)])
    expected, _ = _broken(kind, [])
    assert traces(module) == traces(expected)


@pytest.mark.parametrize("name", METHODS)
def test_after_an_exception_the_same_callback_and_module_train_again(name: str) -> None:
    callback = make(name, "language")
    module, trainer = _broken("language", [callback])
    trainer.fit(module, KINDS["language"].batches())
    second = trainer_for("language", [callback])
    second.fit(module, KINDS["language"].batches())
    assert second.global_step == plain("language").global_step


@pytest.mark.parametrize(
    ("name", "kind"),
    combinations(["ActivationCheckpointing", "WeightQuantization", "LoRA", "QLoRA"], ["language", "vision", "hf_bert"]),
)
def test_apply_can_be_undone(name: str, kind: str) -> None:
    module = build(kind)
    before = traces(module)
    keys, state = list(module.state_dict()), {k: v.clone() for k, v in module.state_dict().items()}
    applied = apply(module, [make(name, kind)])
    assert len(applied) >= 1
    applied.undo()
    assert traces(module) == before
    assert list(module.state_dict()) == keys
    if name != "QLoRA" and name != "WeightQuantization":
        assert_same_state(module.state_dict(), state)


# -- several runs on one module -------------------------------------------------------------------------------------
def _three_runs(kind: str, callbacks: list[Any], namespace: str = NAMESPACES[0]) -> Outcome:
    """Fit, validate, fit: with one Trainer, then with a fresh one."""
    module = build(kind, namespace)
    batches = KINDS[kind].batches
    torch.manual_seed(1)
    trainer = trainer_for(kind, callbacks, namespace)
    trainer.fit(module, batches(), batches())
    trainer.validate(module, batches(), verbose=False)
    trainer.test(module, batches(), verbose=False)
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, batches())
    trainer = trainer_for(kind, callbacks, namespace)
    trainer.fit(module, batches())
    return outcome(module, trainer)


@pytest.mark.parametrize(("name", "kind"), combinations(EXACT, ["vision", "manual"]))
def test_fit_validate_test_fit_again_equals_the_plain_sequence(name: str, kind: str) -> None:
    assert_equal(_three_runs(kind, [make(name, kind)]), _three_runs(kind, []))


@pytest.mark.parametrize("name", OTHERS)
def test_repeated_runs_do_not_stack_a_method(name: str) -> None:
    found = _three_runs("language", [make(name, "language")])
    once = run("language", [make(name, "language")])
    assert list(found.state) == list(once.state)
    assert {k: v.shape for k, v in found.state.items()} == {k: v.shape for k, v in once.state.items()}
    assert found.losses[: len(once.losses) // 2] == once.losses[: len(once.losses) // 2]


def test_a_persistent_transform_is_applied_once_in_the_life_of_a_module() -> None:
    _three_runs("tabular", [Persistent(["layers.?"], name="adapter"), Counted(["layers.?"], name="run")])
    assert Counted.applied.count("adapter") == 1
    assert Counted.applied.count("run") == 5


@pytest.mark.parametrize("name", EXACT)
def test_test_and_predict_alone_give_the_plain_results(name: str) -> None:
    def results(callbacks: list[Any]) -> tuple[list[float], list[Any]]:
        module = build("vision")
        trainer = trainer_for("vision", callbacks)
        trainer.test(module, KINDS["vision"].batches(), verbose=False)
        return module.losses, trainer.predict(module, KINDS["vision"].batches())

    assert results([make(name, "vision")]) == results([])


# -- copies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["language", "hf_llama"])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_the_module_is_independent(name: str, kind: str) -> None:
    module, _ = fit(kind, [make(name, kind)])
    batch = next(iter(KINDS[kind].batches()))
    with torch.no_grad():
        expected = module.eval().loss(batch).item()
        twin = copy.deepcopy(module)
        assert twin.loss(batch).item() == expected
        for parameter in twin.parameters():
            parameter.zero_() if parameter.is_floating_point() else None
        assert module.loss(batch).item() == expected
        assert twin.loss(batch).item() != expected


@pytest.mark.parametrize(("name", "kind"), combinations(METHODS, ["language", "gan"]))
def test_a_copy_made_while_training_runs_its_own_weights(name: str, kind: str) -> None:
    # weight averaging does this; a closure over the original would show here
    batch = next(iter(KINDS[kind].batches()))
    differences = []

    def compare(module: Any) -> None:
        state, twin = torch.get_rng_state(), copy.deepcopy(module)
        with torch.no_grad():
            own = module.loss(batch).item()
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.zero_()
            differences.append(twin.loss(batch).item() != own)
        torch.set_rng_state(state)

    module = build(kind)
    module.watch = compare
    trainer_for(kind, [make(name, kind)]).fit(module, KINDS[kind].batches())
    assert len(differences) == len(plain(kind).losses)
    assert all(differences)


# -- structure ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_tied_weights_stay_tied(name: str) -> None:
    module, _ = fit("tied", [make(name, "tied")])
    assert module.net.head.weight is module.net.embedding.weight
    assert isinstance(module.net.head, nn.Linear)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_nothing_but_themselves(name: str) -> None:
    module, _ = fit("language", [make(name, "language")])
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in n for n in trained)
