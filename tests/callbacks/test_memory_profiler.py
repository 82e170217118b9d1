"""MemoryProfiler in a Trainer: which steps, which numbers, which files, and nothing left behind."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import pytorch_lightning  # noqa: TID251 - the other namespace is what is tested
import torch
from helpers import LitLM, make_loader, make_trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from lightning_memsave import ConfigurationError, MemoryProfiler, MemoryReport, last_report
from lightning_memsave.callbacks import memory_profiler
from lightning_memsave.callbacks._session import Session
from lightning_memsave.memory.report import set_last_report
from lightning_memsave.memory.tracker import track_memory

BATCH_BYTES = 8 * 16 * 8  # 8 rows of 16 int64 tokens


@pytest.fixture(autouse=True)
def no_report():
    set_last_report(None)
    yield
    set_last_report(None)


def fit(module=None, loader=None, *, validation=None, namespace=pl, callback=None, **trainer):
    callback = callback or MemoryProfiler(formats=("json",))
    trainer = make_trainer(namespace, callbacks=[callback], **trainer)
    trainer.fit(module or LitLM(), loader or make_loader(), validation)
    return last_report()


def installed():
    """Return what a profiled step installs in the process."""
    return (
        len(nn_module._global_forward_hooks),
        len(nn_module._global_forward_pre_hooks),
        len(_global_optimizer_pre_hooks),
        torch._C._len_torch_dispatch_stack(),
        "resize_" in torch.UntypedStorage.__dict__,
    )


NOTHING = (0, 0, 0, 0, False)


class Watch(pl.Callback):
    """Note in which steps something is installed."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(installed() != NOTHING)


def test_a_fit_is_measured_at_its_true_peak():
    report = fit()
    module = LitLM()
    weights = sum(p.numel() * 4 for p in module.parameters())
    assert report.by_category["weights"] == weights
    assert report.by_category["gradients"] == weights  # Lightning holds them through the next forward
    assert report.by_category["optimizer_state"] == 2 * weights + 4 * len(list(module.parameters()))
    assert report.by_category["inputs"] == BATCH_BYTES
    assert report.step == 2  # the first step of the steady state
    assert set(report.by_phase) == {"forward", "backward", "optimizer"}
    assert report.by_phase["forward"] == report.peak_bytes
    assert report.by_module["net.blocks.0.up"] > report.by_module["net.blocks.0.q_proj"]
    assert report.host_peak_bytes > 2**20
    assert report.step_seconds > 0
    assert report.device == "cpu"
    assert report.reserved_bytes is None


def test_the_same_step_in_a_plain_loop_has_the_same_peak():
    report = fit(callback=MemoryProfiler(steps=(1,), formats=()))
    module, batch = LitLM(), next(iter(make_loader()))
    optimizer = module.configure_optimizers()
    with track_memory(module, optimizers=[optimizer], inputs=batch) as tracker:
        module.loss(batch).backward()
        optimizer.step()
    plain = tracker.measurement()
    scalars = 32  # bytes: the loss and the logged values that Lightning holds; 20 seen
    assert 0 <= report.saved_for_backward_bytes - plain.saved_for_backward_bytes <= scalars
    assert 0 <= report.peak_bytes - plain.peak_bytes <= scalars


def test_only_chosen_steps_have_anything_installed():
    watch = Watch()
    trainer = make_trainer(callbacks=[MemoryProfiler(steps=(2, 4), formats=()), watch], max_epochs=2)
    trainer.fit(LitLM(), make_loader())
    assert watch.seen == [False, True, False, True, False, False]
    assert installed() == NOTHING


def test_files_are_where_the_contract_says(tmp_path):
    pytest.importorskip("matplotlib")
    report = fit(callback=MemoryProfiler(formats=("json", "html", "png", "svg")), default_root_dir=tmp_path)
    folder = tmp_path / "memsave"
    assert {path.name for path in folder.iterdir()} == {"memory.json", "memory.html", "memory.png", "memory.svg"}
    assert MemoryReport.from_json(folder / "memory.json") == report


def test_loggers_get_scalars_of_each_profiled_step(tmp_path):
    report = fit(
        logger=CSVLogger(tmp_path), callback=MemoryProfiler(steps=(1, 2), formats=()), default_root_dir=tmp_path
    )
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("memory/peak_bytes")
    peaks = [int(float(row.split(",")[column])) for row in rows if row.split(",")[column]]
    assert len(peaks) == 2
    assert max(peaks) == report.peak_bytes
    assert {f"memory/{name}_bytes" for name in report.by_category} <= set(header.split(","))


def test_validation_is_a_phase_of_its_own():
    report = fit(validation=make_loader(), num_sanity_val_steps=2)
    assert set(report.by_phase) == {"forward", "backward", "optimizer", "validation"}
    assert 0 < report.by_phase["validation"] < report.peak_bytes


def test_the_sanity_check_is_left_alone():
    seen = []

    class Sanity(LitLM):
        def validation_step(self, batch, batch_idx):
            seen.append((self.trainer.sanity_checking, installed() != NOTHING))
            super().validation_step(batch, batch_idx)

    fit(Sanity(), validation=make_loader(), num_sanity_val_steps=1)
    assert (True, False) in seen
    assert (False, True) in seen
    assert (True, True) not in seen


def test_validate_alone_is_profiled(tmp_path):
    trainer = make_trainer(callbacks=[MemoryProfiler(formats=("json",))], default_root_dir=tmp_path)
    trainer.validate(LitLM(), make_loader(), verbose=False)
    assert set(last_report().by_phase) == {"validation"}
    assert (tmp_path / "memsave" / "memory.json").exists()


def test_other_stages_say_that_nothing_is_profiled(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning_memsave"), "propagate", True)
    trainer = make_trainer(callbacks=[MemoryProfiler()])
    with caplog.at_level(logging.INFO, "lightning_memsave"):
        trainer.test(LitLM(), make_loader(), verbose=False)
    assert "nothing is profiled in test" in caplog.text
    assert last_report() is None


def test_accumulated_batches_are_one_step():
    watch = Watch()

    class Batches(pl.Callback):
        seen = []

        def on_before_backward(self, trainer, pl_module, loss):
            self.seen.append(installed() != NOTHING)

    trainer = make_trainer(
        callbacks=[MemoryProfiler(steps=(1,), formats=()), watch, Batches()], max_epochs=2, accumulate_grad_batches=2
    )
    trainer.fit(LitLM(), make_loader())
    assert Batches.seen == [True, True, False, False, False, False]
    assert "optimizer" in last_report().by_phase


def test_an_accumulated_step_is_logged_once_at_its_highest_batch(tmp_path):
    callback = MemoryProfiler(steps=(1,), formats=())
    report = fit(callback=callback, logger=CSVLogger(tmp_path), accumulate_grad_batches=3, default_root_dir=tmp_path)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("memory/peak_bytes")
    assert [int(float(row.split(",")[column])) for row in rows] == [report.peak_bytes]
    assert report.by_category["gradients"] == report.by_category["weights"]  # held from the batches before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at every input's
def test_compiled_blocks_are_profiled_uncompiled_and_said():
    module = LitLM()
    for block in module.net.blocks:
        block.compile(backend="aot_eager")
    found = fit(module, callback=MemoryProfiler(steps=(2,), formats=()))
    expected = fit(callback=MemoryProfiler(steps=(2,), formats=()))
    assert any("ran uncompiled" in note for note in found.notes)
    assert found.by_category["activations"] == expected.by_category["activations"]


def test_an_exception_leaves_nothing_and_keeps_what_was_seen(tmp_path):
    class Fails(LitLM):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise RuntimeError("out of luck")
            return loss

    module = Fails()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, default_root_dir=tmp_path)
    assert installed() == NOTHING
    assert all(not p._post_accumulate_grad_hooks for p in module.parameters())
    report = MemoryReport.from_json(tmp_path / "memsave" / "memory.json")
    assert report == last_report()
    assert any("ended in an exception" in note for note in report.notes)
    assert report.peak_bytes > 0


def test_a_fit_that_dies_in_its_first_step_still_shows_where_the_bytes_were():
    class Fails(LitLM):
        def backward(self, loss):
            raise MemoryError("no more")

    with pytest.raises(MemoryError):
        fit(Fails())
    assert last_report().by_category["activations"] > 0
    assert installed() == NOTHING


def test_a_skipped_epoch_ends_the_step():
    class Skips(LitLM):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    fit(Skips(), max_epochs=2)
    assert installed() == NOTHING
    assert last_report() is not None


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copied_callback_leaves_its_report(copy_of):
    callback = MemoryProfiler(steps=(1,), formats=())
    report = fit(callback=copy_of(callback))
    assert report is last_report()
    assert vars(callback) == {"steps": (1,), "formats": (), "snapshot": False}


def test_both_namespaces_are_served():
    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    report = fit(Other(), DataLoader(torch.ones(4, 4), batch_size=2), namespace=pytorch_lightning)
    assert report.by_category["weights"] == 5 * 4
    assert report.by_category["inputs"] == 2 * 4 * 4


def test_fast_dev_run_is_profiled():
    assert fit(fast_dev_run=True).step == 1


def test_two_profilers_do_not_get_in_each_others_way(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning_memsave"), "propagate", True)
    trainer = make_trainer(callbacks=[MemoryProfiler(steps=(1,), formats=()), MemoryProfiler(steps=(1, 2), formats=())])
    with caplog.at_level(logging.INFO, "lightning_memsave"):
        trainer.fit(LitLM(), make_loader())
    assert last_report().step == 1  # the first one profiles
    assert (
        "MemoryProfiler(steps=(1,), formats=()) profiles, MemoryProfiler(steps=(1, 2), formats=()) does not"
        in caplog.text
    )
    assert installed() == NOTHING


def test_a_second_fit_is_counted_anew():
    callback, module = MemoryProfiler(steps=(1,), formats=()), LitLM()
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(module, make_loader())
    first = last_report()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    assert last_report() is not first
    assert Session.find(trainer) is None


class Manual(pl.LightningModule):
    """Two networks, two optimizers, several steps in one training_step, and a penalty on a gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        self.toggle_optimizer(one)
        loss = self.left(batch).pow(2).sum()
        one.zero_grad()
        self.manual_backward(loss)
        one.step()
        self.untoggle_optimizer(one)
        x = batch.clone().requires_grad_()
        out = self.right(self.left(x)).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        two.zero_grad()
        self.manual_backward(out + slope.pow(2).sum(), retain_graph=True)
        self.manual_backward(out)
        two.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.left.parameters()), torch.optim.AdamW(self.right.parameters())


def test_manual_optimization_with_several_optimizers_is_measured():
    report = fit(Manual(), DataLoader(torch.ones(32, 4), batch_size=8))
    assert report.by_category["weights"] == (16 + 4) * 4  # toggled or not, an optimizer holds them
    assert set(report.by_phase) == {"forward", "backward", "optimizer"}
    assert report.by_category["optimizer_state"] == 2 * (16 + 4) * 4 + 2 * 4


@dataclass
class Pair:
    x: torch.Tensor
    extra: dict


class Custom:
    """A batch object that Lightning moves by its own method."""

    def __init__(self, x):
        self.x = x

    def to(self, *args, **kwargs):
        return self


def as_dict(x):
    return {"x": x, "name": ["row"] * len(x)}


def as_tuple(x):
    return ({"x": x}, x.clone())


def as_pair(x):
    return Pair(x, {"y": x.clone()})


def as_custom(x):
    return Custom(x)


@pytest.mark.parametrize(("collate", "copies"), [(as_dict, 1), (as_tuple, 2), (as_pair, 2), (as_custom, 1)])
def test_batches_of_any_kind_are_inputs(collate, copies):
    class Any(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            x = batch[0]["x"] if isinstance(batch, tuple) else batch["x"] if isinstance(batch, dict) else batch.x
            return self.net(x).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = DataLoader(torch.ones(8, 4), batch_size=4, collate_fn=lambda rows: collate(torch.stack(rows)))
    report = fit(Any(), loader, callback=MemoryProfiler(steps=(1,), formats=()))
    assert report.by_category["inputs"] == copies * 4 * 4 * 4


def _rank_report(rank):
    trainer = make_trainer(devices=2, strategy="ddp", callbacks=[MemoryProfiler(steps=(1, 2), formats=("json",))])
    trainer.fit(LitLM(), make_loader())
    report = last_report()
    return rank, report.peak_bytes, report.by_rank, report.by_category, trainer.default_root_dir


def test_every_rank_is_measured_and_the_first_one_writes(ranks, tmp_path):
    results = ranks(_rank_report)
    for rank, peak, by_rank, by_category, _ in results:
        assert by_rank[rank] == peak
        assert len(by_rank) == 2
        assert by_category["gradients"] == by_category["weights"]
    written = json.loads((tmp_path / "memsave" / "memory.json").read_text())
    assert written["by_rank"] == [result[1] for result in results]


def _rank_buckets(rank, view):
    from lightning.pytorch.strategies import DDPStrategy

    peaks = []
    for step in (2, 3):
        callback = MemoryProfiler(steps=(step,), formats=())
        trainer = make_trainer(devices=2, strategy=DDPStrategy(gradient_as_bucket_view=view), callbacks=[callback])
        trainer.fit(LitLM(), make_loader(batch_size=4))
        report = last_report()
        assert sum(report.by_category.values()) == report.peak_bytes
        peaks.append((report.peak_bytes, report.by_module.get("(communication)", 0), report.by_phase["optimizer"]))
    return peaks


def test_buckets_of_ddp_are_the_size_of_the_gradients(ranks):
    gradients = sum(p.numel() * 4 for p in LitLM().parameters())
    for own, views in zip(ranks(_rank_buckets, False), ranks(_rank_buckets, True)):
        for second, third in (own, views):  # rebuilt in the second step, found late in the third: the same bytes
            assert second[1:] == third[1:]
            assert abs(second[0] - third[0]) <= 16  # a scalar that Lightning holds at times; 4 seen
        assert own[0][1] == gradients
        assert views[0][1] == 0  # the gradients themselves are the buckets
        assert own[0][2] - views[0][2] == gradients


def _rank_sharded(rank):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(LitLM):
        def configure_model(self):
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = make_trainer(devices=2, strategy=strategy, callbacks=[MemoryProfiler(steps=(1, 2), formats=())])
    trainer.fit(Sharded(), make_loader())
    report = last_report()
    return report.peak_bytes, report.by_category, report.by_module_category, installed()


def test_sharded_parameters_count_their_shard_and_what_is_gathered(ranks):
    whole = sum(p.numel() * 4 for p in LitLM().parameters())
    embedding = 64 * 64 * 4
    for peak, by_category, _, left in ranks(_rank_sharded):
        assert sum(by_category.values()) == peak
        assert by_category["optimizer_state"] < 1.1 * whole  # half of two moments
        assert by_category["weights"] >= whole // 2
        assert by_category["weights"] < 2 * whole + embedding
        assert left == NOTHING


def test_wrong_arguments_are_listed_together():
    with pytest.raises(ConfigurationError) as error:
        MemoryProfiler(steps=(0, 1.5), formats=("pdf",))
    assert "steps=(0, 1.5)" in str(error.value)
    assert "formats=('pdf',)" in str(error.value)
    with pytest.raises(ConfigurationError, match="steps"):
        MemoryProfiler(steps=())
    assert MemoryProfiler(steps=3).steps == (3,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_a_snapshot_without_cuda_is_refused_before_training():
    module = LitLM()
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        fit(module, callback=MemoryProfiler(snapshot=True))
    assert module.losses == []


def test_without_matplotlib_the_picture_is_left_out_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_profiler, "is_available", lambda name: False)
    with pytest.warns(UserWarning, match="matplotlib is not installed"):
        fit(callback=MemoryProfiler(), default_root_dir=tmp_path)
    assert {path.name for path in (tmp_path / "memsave").iterdir()} == {"memory.json", "memory.html"}


def test_losses_are_bitwise_the_same():
    plain, profiled = LitLM(dropout=0.1), LitLM(dropout=0.1)
    torch.manual_seed(1)
    make_trainer().fit(plain, make_loader())
    torch.manual_seed(1)
    fit(profiled)
    assert plain.losses == profiled.losses


def test_an_idle_profiler_costs_less_than_one_percent_of_a_step():
    """Time the hooks themselves: the difference of two fits is noise at this size.

    Thread time, best of 20: what other processes take from this one is no cost of the hooks.
    """
    callback = MemoryProfiler(steps=(1,), formats=())
    costs = []

    class Timed(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch != 2:
                return
            batch = next(iter(make_loader()))
            for _ in range(20):
                started = time.thread_time()
                for _ in range(50):
                    callback.on_train_batch_start(trainer, pl_module, batch, 0)
                    callback.on_before_optimizer_step(trainer, pl_module, None)
                    callback.on_train_batch_end(trainer, pl_module, None, batch, 0)
                costs.append((time.thread_time() - started) / 50)

    trainer = make_trainer(callbacks=[callback, Timed()], max_epochs=5)
    trainer.fit(LitLM(), make_loader())
    assert len(costs) == 20
    assert min(costs) < 0.01 * last_report().step_seconds
    assert min(costs) < 50e-6  # seconds; 5e-6 seen
