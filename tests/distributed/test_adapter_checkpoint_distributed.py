"""Adapter checkpoints on two processes: DDP, and FSDP2 with a module that shards itself (folders and files)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_memsave import AdapterCheckpoint, CheckpointMismatchError, LoRA, QLoRA, apply, load_adapters

BLOCKS = ["*.q_proj", "*.up"]
States = dict[str, Tensor]


def whole(module: nn.Module) -> States:
    state = {
        k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in module.state_dict().items() if isinstance(v, Tensor)
    }
    return {key: value.clone() for key, value in state.items()}


def fit(
    module: Any, savers: list[Any], folder: str, strategy: Any, *, epochs: int, ckpt_path: str | None = None
) -> Any:
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(
        callbacks=[*savers, saver],
        max_epochs=epochs,
        enable_checkpointing=True,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(module, make_loader(), ckpt_path=ckpt_path)
    return trainer


def equal(a: States, b: States) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# -- DDP ----------------------------------------------------------------------------------------------------------
def _ddp(rank: int, folder: str) -> tuple[States, States, list[str]]:
    def run(epochs: int, name: str, ckpt_path: str | None = None) -> States:
        module = LitLM()
        fit(module, [QLoRA(rank=4, modules=BLOCKS)], f"{folder}/{name}", "ddp", epochs=epochs, ckpt_path=ckpt_path)
        return whole(module)

    expected = run(2, "a")
    run(1, "b")
    resumed = run(2, "b", f"{folder}/b/epoch=0.ckpt")
    return expected, resumed, sorted(torch.load(f"{folder}/a/epoch=1.ckpt", weights_only=True)["state_dict"])


def test_ddp_resumes_bitwise_from_an_adapter_checkpoint(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for expected, resumed, keys in ranks(_ddp, str(tmp_path)):
        assert equal(expected, resumed)
        assert len(keys) == 8
        assert all(".lora_" in key for key in keys)


# -- FSDP2 --------------------------------------------------------------------------------------------------------
class Sharded(LitLM):
    """Adapts or freezes itself, then shards itself, as ``ModelParallelStrategy`` asks its users to."""

    def __init__(self, how: str = "lora", **kwargs: Any) -> None:
        self.how = how
        super().__init__("configure_model", **kwargs)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "net"):
            return
        self._build()
        self.prepare()
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def prepare(self) -> None:
        if self.how == "frozen":
            self.statistics = nn.BatchNorm1d(4)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("blocks.1" in name)
        else:
            methods = {"lora": LoRA, "qlora": QLoRA}
            apply(self, [methods[self.how](rank=4, modules=BLOCKS)])


def strategy(distributed: bool) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed)


def _fsdp2(rank: int, folder: str, how: str, distributed: bool) -> tuple[States, States, States, dict[str, Any]]:
    def run(epochs: int, name: str, ckpt_path: str | None = None) -> Any:
        module = Sharded(how)
        fit(
            module, [AdapterCheckpoint()], f"{folder}/{name}", strategy(distributed), epochs=epochs, ckpt_path=ckpt_path
        )
        return module

    expected = whole(run(2, "a"))
    run(1, "b")
    resumed = whole(run(2, "b", f"{folder}/b/epoch=0.ckpt"))
    evaluated = Sharded(how)
    trainer = make_trainer(callbacks=[AdapterCheckpoint()], strategy=strategy(distributed), devices=2)
    trainer.validate(evaluated, make_loader(), ckpt_path=f"{folder}/a/epoch=1.ckpt", verbose=False)
    path = Path(folder, "a", "epoch=1.ckpt", *(["meta.pt"] if distributed else []))
    return expected, resumed, whole(evaluated), torch.load(path, weights_only=True)["memsave"]


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("how", ["lora", "qlora", "frozen"])
def test_fsdp2_resumes_bitwise_and_evaluates(
    how: str, distributed: bool, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for expected, resumed, evaluated, record in ranks(_fsdp2, str(tmp_path), how, distributed):
        assert equal(expected, resumed)
        assert equal(expected, evaluated)
        assert record["base"]["net.embedding.weight"]["content"] is not None


def _small(rank: int, folder: str, distributed: bool) -> None:
    fit(Sharded(), [AdapterCheckpoint()], folder, strategy(distributed), epochs=1)


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
def test_adapters_of_an_fsdp2_run_load_into_one_process(
    distributed: bool, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """The base was hashed in shards there and whole here, and the hashes agree."""
    ranks(_small, str(tmp_path), distributed)
    module = LitLM()
    apply(module, [LoRA(rank=4, modules=BLOCKS)])
    assert load_adapters(module, tmp_path / "epoch=0.ckpt") == 8
    assert all(p.abs().sum() > 0 for n, p in module.named_parameters() if ".lora_B." in n)
    other = LitLM()
    apply(other, [LoRA(rank=4, modules=BLOCKS)])
    with torch.no_grad():
        other.net.embedding.weight[1, 1] += 1
    with pytest.raises(CheckpointMismatchError, match=r"net\.embedding\.weight\) of other content"):
        load_adapters(other, tmp_path / "epoch=0.ckpt")


def _from_one_process(rank: int, path: str) -> tuple[States, list[str]]:
    module = Sharded()
    fit(module, [AdapterCheckpoint()], f"{path}-{0}", strategy(False), epochs=2, ckpt_path=path)
    steps = [float(s["step"]) for s in module.trainer.optimizers[0].state.values()]
    return whole(module), [str(step) for step in steps]


def test_fsdp2_goes_on_from_a_checkpoint_of_one_process(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    def run(epochs: int) -> Any:
        module = LitLM()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}-" + "{epoch}", save_top_k=-1)
        savers = [LoRA(rank=4, modules=BLOCKS), saver]
        make_trainer(callbacks=savers, max_epochs=epochs, enable_checkpointing=True).fit(module, make_loader())
        return module

    expected = whole(run(2))
    run(1)
    for state, steps in ranks(_from_one_process, str(tmp_path / "1-epoch=0.ckpt")):
        assert set(steps) == {"6.0"}
        for key, value in expected.items():
            # worst seen 0.0; averaging the gradients of two halves may round differently elsewhere
            torch.testing.assert_close(state[key], value, rtol=0, atol=2e-6)


def _refusals(rank: int, folder: str, distributed: bool) -> list[str]:
    fit(Sharded(), [AdapterCheckpoint()], folder, strategy(distributed), epochs=1)
    path = f"{folder}/epoch=0.ckpt"

    class Other(Sharded):
        def prepare(self) -> None:
            with torch.no_grad():
                self.net.embedding.weight[0, 0] += 1
            super().prepare()

    class Rank(Sharded):
        def prepare(self) -> None:
            apply(self, [LoRA(rank=8, modules=BLOCKS)])

    class Fewer(Sharded):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(p for n, p in self.named_parameters() if "blocks.1.up.lora" in n)

    messages = []
    for cls in (Other, Rank, Fewer):
        try:
            fit(cls(), [AdapterCheckpoint()], f"{folder}/x", strategy(distributed), epochs=2, ckpt_path=path)
        except CheckpointMismatchError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
def test_fsdp2_refuses_what_does_not_fit(distributed: bool, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for base, rank, optimizer in ranks(_refusals, str(tmp_path), distributed):
        assert "1 frozen weight (first: net.embedding.weight) of other content" in base
        assert "it was saved with rank 4, and the module has rank 8. Write rank=4." in rank
        assert "saved for 8 parameters and the optimizer now has 2" in optimizer


def _weights_only(rank: int, folder: str, distributed: bool) -> str:
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, filename="c", save_weights_only=True)
    make_trainer(
        callbacks=[AdapterCheckpoint(), saver], strategy=strategy(distributed), devices=2, enable_checkpointing=True
    ).fit(Sharded(), make_loader())
    make_trainer(callbacks=[AdapterCheckpoint()], strategy=strategy(distributed), devices=2).validate(
        Sharded(), make_loader(), ckpt_path=f"{folder}/c.ckpt", verbose=False
    )
    try:
        fit(
            Sharded(),
            [AdapterCheckpoint()],
            f"{folder}/x",
            strategy(distributed),
            epochs=2,
            ckpt_path=f"{folder}/c.ckpt",
        )
    except CheckpointMismatchError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
def test_fsdp2_says_when_a_checkpoint_has_no_optimizer(
    distributed: bool, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    for message in ranks(_weights_only, str(tmp_path), distributed):
        assert "The checkpoint holds weights only and no optimizer state" in message
