"""BlockDDPStrategy: its arguments, the YAML that makes it, and processes that are forked."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.cli import LightningCLI
from packaging.version import Version

from lightning_memsave import BlockDDPStrategy, ConfigurationError, LoRA
from lightning_memsave.callbacks._lightning import NAMESPACES, strategy_kind


class NoArguments(LitLM):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"find_unused_parameters": True}, "find_unused_parameters: parameters without a gradient are always found"),
        ({"gradient_as_bucket_view": True}, "gradient_as_bucket_view: there is no second copy"),
        ({"bucket_cap_mb": 25}, 'bucket_cap_mb: write bucket_size="25MiB"'),
        ({"ddp_comm_hook": print}, 'Use strategy="ddp" for it'),
        (
            {"no_such": 1},
            "no_such is no argument of this strategy. It has bucket_size, broadcast_buffers, cluster_",
        ),
        ({"bucket_size": "many"}, "bucket_size"),
        ({"bucket_size": 0}, "bucket_size=0"),
        ({"bucket_size": -3, "static_graph": True}, "static_graph: nothing is assumed"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_write(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BlockDDPStrategy(**arguments)
    assert message in str(caught.value)


@pytest.mark.skipif(Version(pl.__version__) < Version("2.6"), reason="Lightning 2.5 refuses it in its own words")
def test_among_the_callbacks_it_says_where_it_belongs() -> None:
    with pytest.raises(ConfigurationError, match=r"not a callback.*Write Trainer\(strategy=BlockDDPStrategy\("):
        make_trainer(pl, callbacks=[BlockDDPStrategy()]).fit(LitLM(), make_loader())


def test_the_arguments_of_ddp_pass_through_by_name() -> None:
    environment = LightningEnvironment()
    strategy = BlockDDPStrategy(
        cluster_environment=environment,
        process_group_backend="gloo",
        timeout=timedelta(seconds=77),
        start_method="fork",
    )
    trainer = make_trainer(strategy=strategy, devices=2)
    assert strategy.cluster_environment is environment
    assert strategy.process_group_backend == "gloo"
    assert strategy._timeout == timedelta(seconds=77)
    assert type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"
    assert strategy_kind(strategy) == "memsave_ddp"
    for namespace in NAMESPACES:
        assert isinstance(strategy, namespace.strategies.DDPStrategy)


def test_a_yaml_file_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  devices: 2\n  strategy:\n    class_path: lightning_memsave.BlockDDPStrategy\n"
        "    init_args: {bucket_size: 8MiB, broadcast_buffers: false, process_group_backend: gloo}\n"
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "config.yaml"])
    cli = LightningCLI(NoArguments, run=False, seed_everything_default=0)
    assert type(cli.trainer.strategy) is BlockDDPStrategy
    assert (cli.trainer.strategy.bucket_size, cli.trainer.strategy.broadcast_buffers) == ("8MiB", False)
    assert cli.trainer.strategy.process_group_backend == "gloo"


def _one_device(rank: int) -> list[bool]:
    warnings.simplefilter("ignore")
    alone, plain = LitLM(), LitLM()
    make_trainer(strategy=BlockDDPStrategy(), use_distributed_sampler=False).fit(alone, make_loader())
    make_trainer().fit(plain, make_loader())
    same = [torch.equal(a, b) for a, b in zip(alone.parameters(), plain.parameters(), strict=True)]
    return [alone.losses == plain.losses, all(same)]


def test_one_device_trains_as_without_it(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(_one_device, world_size=1) == [[True, True]]


def test_forked_processes_bring_the_weights_back_as_ddp_does() -> None:
    warnings.simplefilter("ignore")

    def train(strategy: object) -> LitLM:
        module = LitLM()
        make_trainer(strategy=strategy, devices=2).fit(module, make_loader(batch_size=4))
        return module

    ours, theirs = train(BlockDDPStrategy(start_method="fork", bucket_size="20kB")), train("ddp_fork")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in ours.parameters())


def test_adapters_trained_in_forked_processes_need_a_checkpoint() -> None:
    trainer = make_trainer(pl, strategy=BlockDDPStrategy(start_method="fork"), devices=2, callbacks=[LoRA(rank=4)])
    with pytest.raises(Exception, match="training in spawned processes changes copies of the module"):
        trainer.fit(LitLM(), make_loader())
