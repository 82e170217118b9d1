"""MemoryAudit in a Trainer: what the first step shows, the file, strict mode, and that nothing stays behind."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitLM, make_loader, make_trainer
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from lightning_memsave import (
    ActivationCheckpointing,
    ConfigurationError,
    EarlyZeroGrad,
    GradientRelease,
    LowMemoryOptimizer,
    MemoryAudit,
    QLoRA,
)


def audit(module: Any, *callbacks: Any, strict: bool = False, namespace: Any = pl, **trainer: Any) -> dict[str, Any]:
    """Fit, and return the findings of ``audit.json`` by check, and how many batches were looked at."""
    made = make_trainer(namespace, callbacks=[MemoryAudit(strict=strict), *callbacks], **trainer)
    made.fit(module, make_loader())
    return read(made)


def read(trainer: Any) -> dict[str, Any]:
    with open(f"{trainer.default_root_dir}/memsave/audit.json") as file:
        data = json.load(file)
    found: dict[str, Any] = {"batches": data["batches"], "lines": data["lines"]}
    for finding in data["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return found


class Detached(LitLM):
    """Cuts the first block off from the loss."""

    def loss(self, batch: Tensor) -> Tensor:
        x = self.net.embedding(batch)
        x = self.net.blocks[1](self.net.blocks[0](x).detach())
        return self.net.head(self.net.norm(x)).square().mean()


def test_a_sound_run_is_all_ok():
    found = audit(LitLM(), ActivationCheckpointing(), strict=True)
    assert found["batches"] == 1
    assert found["recomputation"] == [
        {
            "check": "recomputation",
            "status": "ok",
            "text": "2 of 2 blocks ran again in backward (2 recomputes of 2 forwards).",
            "names": [],
        }
    ]
    assert found["gradients"][0]["text"] == "AdamW: all 28 trainable tensors got a gradient."
    state = 2 * sum(p.nbytes for p in LitLM().parameters()) + 28 * 4
    assert found["optimizer state"][0]["text"] == f"AdamW holds state: {state / 1024:.2f} KiB float32."
    assert found["attention"][0]["text"].startswith("2 calls of scaled_dot_product_attention in float32, causal")
    assert ["ActivationCheckpointing", "recompute 2 Block in backward"] in found["lines"]


def test_a_second_recompute_for_the_norm_is_no_warning():
    found = audit(LitLM(), ActivationCheckpointing(), GradientRelease(clip="two_pass"), gradient_clip_val=1.0)
    assert [(f["status"], f["text"]) for f in found["recomputation"]] == [
        ("ok", "2 of 2 blocks ran again in backward (4 recomputes of 2 forwards; a backward may run 2 times).")
    ]


def test_tensors_without_gradient_are_named():
    found = audit(Detached())
    (finding,) = found["gradients"]
    assert finding["status"] == "problem"
    assert finding["text"].startswith("AdamW: 13 of 28 trainable tensors got no gradient: net.embedding.weight, ")
    assert set(finding["names"]) == {"net.embedding.weight"} | {
        f"net.blocks.0.{name}" for name, _ in LitLM().net.blocks[0].named_parameters()
    }


def test_strict_raises_after_the_first_step_and_leaves_the_file():
    module = Detached()
    before = copy.deepcopy(module.state_dict())
    trainer = make_trainer(callbacks=[MemoryAudit(strict=True)])
    with pytest.raises(ConfigurationError, match=r"MemoryAudit\(strict=True\): gradients: AdamW: 13 of 28"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 1
    assert read(trainer)["gradients"][0]["status"] == "problem"
    assert not torch.equal(before["net.head.weight"], module.state_dict()["net.head.weight"])


def test_blocks_that_never_recompute_are_a_problem():
    class Bypassed(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            return self.net.head(self.net.embedding(batch)).square().mean()

    found = audit(Bypassed(), ActivationCheckpointing())
    assert [(f["status"], f["text"].split(":")[0]) for f in found["recomputation"]] == [
        ("warning", "2 blocks were never called"),
        ("problem", "none of the 2 selected blocks was recomputed"),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo reads it while it traces
@pytest.mark.parametrize("inner", [True, False])
def test_compiled_blocks_are_not_counted_and_not_blamed(inner):
    class Compiled(LitLM):
        def _build(self) -> None:
            super()._build()
            for module in self.net.blocks if inner else [self.net]:
                module.compile(backend="eager")

    found = audit(Compiled(), ActivationCheckpointing(), strict=True)
    torch._dynamo.reset()
    assert [f["text"] for f in found["recomputation"]] == [
        "2 blocks are compiled: the compiler recomputes them, uncounted."
    ]


def test_a_frozen_encoder_is_a_warning_and_not_a_problem():
    class Frozen(LitLM):
        def _build(self) -> None:
            super()._build()
            self.net.embedding.requires_grad_(False)
            self.net.blocks[0].requires_grad_(False)

    found = audit(Frozen(), ActivationCheckpointing(), precision="bf16-mixed", strict=True)
    assert [f["status"] for f in found["recomputation"]] == ["ok", "warning"]
    assert found["recomputation"][1]["names"] == ["net.blocks.0"]
    assert found["gradients"][0]["status"] == "ok"
    assert "of frozen fp32 weights are cast again at every use" in found["frozen weights"][0]["text"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_window_is_one_optimizer_step(accumulate):
    found = audit(LitLM(), EarlyZeroGrad(), accumulate_grad_batches=accumulate)
    assert found["batches"] == accumulate
    assert found["gradients"][0]["status"] == "ok"


def test_a_run_shorter_than_the_window_is_judged_at_its_end():
    class Never(LitLM):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    found = audit(Never())
    assert found["batches"] == 3
    assert found["gradients"][0]["text"] == "AdamW did not step: its gradients were not looked at."


class Alternating(pl.LightningModule):
    """Two optimizers under toggling; the second steps every other batch only, one tensor is in neither."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two, self.left = nn.Linear(16, 4), nn.Linear(4, 1), nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        index = batch_idx % 2
        optimizer = self.optimizers()[index]
        self.toggle_optimizer(optimizer)
        loss = self.left(self.two(self.one(batch.float()))).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.one.parameters(), 1e-3), torch.optim.Adam(self.two.parameters(), 1e-3)


def test_alternating_optimizers_are_each_judged_at_their_own_step():
    found = audit(Alternating())
    assert found["batches"] == 2
    assert [f["text"] for f in found["gradients"][:2]] == [
        "SGD 0: all 2 trainable tensors got a gradient.",
        "Adam 1: all 2 trainable tensors got a gradient.",
    ]
    assert found["gradients"][2]["status"] == "warning"
    assert found["gradients"][2]["names"] == ["left.weight", "left.bias"]


def test_8bit_state_that_is_not_8bit_is_a_problem():
    found = audit(LitLM(width=16), LowMemoryOptimizer("adamw_8bit"))
    assert found["optimizer state"][0]["status"] == "problem"
    assert "0 of 28 tensors in 8 bits (28 have fewer than 4096 values" in found["optimizer state"][0]["text"]


def test_8bit_state_is_counted_by_dtype():
    found = audit(LitLM(), LowMemoryOptimizer("adamw_8bit"))
    assert found["optimizer state"][0]["status"] == "ok"
    assert "200.00 KiB uint8" in found["optimizer state"][0]["text"]
    assert (
        "13 of 28 tensors in 8 bits (14 have fewer than 4096 values, 1 are kept" in found["optimizer state"][0]["text"]
    )


def test_quantized_weights_that_an_optimizer_was_given_are_no_problem():
    """``Optimizer(self.parameters())`` is how most modules are written; what is frozen gets no gradient."""

    class All(LitLM):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    found = audit(All(), QLoRA(rank=2), strict=True)
    assert found["dtypes"][0]["status"] == "ok"
    assert found["dtypes"][0]["text"].startswith("12 quantized tensors are in an optimizer, which passes over them")


def test_dense_masks_are_shown():
    class Masked(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            x = self.net.embedding(batch).unsqueeze(1)
            mask = torch.ones(16, 16, dtype=torch.bool)
            x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            return self.net.head(self.net.blocks[1](self.net.blocks[0](x.squeeze(1)))).square().mean()

    found = audit(Masked())
    assert any("a dense bool mask (16, 16)" in f["text"] for f in found["attention"])


def test_half_precision_trainables_are_a_problem():
    class Half(LitLM):
        def _build(self) -> None:
            super()._build()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float16))

        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) * self.scale

    found = audit(Half())
    assert found["dtypes"][0]["status"] == "problem"
    assert found["dtypes"][0]["names"] == ["scale"]


def test_the_models_own_reentrant_checkpoint_is_reported():
    class Own(LitLM):
        def loss(self, batch: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            x = self.net.embedding(batch)
            for block in self.net.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return self.net.head(x).square().mean()

    found = audit(Own())
    assert "the model calls reentrant torch.utils.checkpoint itself (2 times)" in found["recomputation"][0]["text"]


def test_eager_attention_of_transformers_is_named():
    import transformers

    class Eager(LitLM):
        def _build(self) -> None:
            config = transformers.LlamaConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
            )
            config._attn_implementation = "eager"
            self.net = transformers.LlamaForCausalLM(config)

        def loss(self, batch: Tensor) -> Tensor:
            return self.net(input_ids=batch, labels=batch).loss

    found = audit(Eager(), ActivationCheckpointing(), strict=True)
    assert found["attention"][0]["names"] == ["net", "net.model"]
    assert found["recomputation"][0]["text"].startswith("2 of 2 blocks ran again in backward (2 recomputes of 2")


def step_hooks() -> int:
    """Hooks on the steps of all optimizers: the audit looks at those that step inside of a backward too."""
    return len(_global_optimizer_post_hooks)


def test_hooks_are_gone_after_the_audit_and_a_second_fit_audits_again():
    before = step_hooks()

    class Watch(pl.Callback):
        hooks: list[int] = []

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self.hooks.append(step_hooks() - before)

    watch = Watch()
    trainer = make_trainer(callbacks=[MemoryAudit(), watch], max_epochs=1)
    module = LitLM()
    trainer.fit(module, make_loader())
    assert watch.hooks == [1, 0, 0]
    first = read(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    assert watch.hooks == [1, 0, 0, 1, 0, 0]
    assert read(trainer)["gradients"] == first["gradients"]


def test_an_exception_in_the_first_step_takes_the_hooks_off():
    before, during = step_hooks(), []

    class Fails(LitLM):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            during.append(step_hooks())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        make_trainer(callbacks=[MemoryAudit()]).fit(Fails(), make_loader())
    assert (during, step_hooks()) == ([before + 1], before)


def test_the_other_namespace_is_audited_alike():
    namespace = importlib.import_module("pytorch_lightning")

    class Other(namespace.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch.float()).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    found = audit(Other(), strict=True, namespace=namespace)
    assert found["gradients"][0]["text"] == "SGD: all 2 trainable tensors got a gradient."
    assert found["optimizer state"][0]["text"] == "SGD holds state: none."


def test_the_table_shows_what_was_found(caplog, capsys):
    from lightning_memsave.memory.audit import AuditReport, Finding

    report = AuditReport([Finding("gradients", "problem", "[SGD] 2 of 3 ..."), Finding("attention", "ok", "fine")], 2)
    lines = report.table(80).splitlines()
    assert lines[0] == "Audit of the first 2 batches"
    assert any(line.split() == ["gradients", "problem", "[SGD]", "2", "of", "3", "..."] for line in lines)
    assert [finding.check for finding in report.problems] == ["gradients"]


def test_the_callback_is_configuration_only():
    callback = MemoryAudit(strict=True)
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(callback)))) == "MemoryAudit(strict=True)"
    with pytest.raises(ConfigurationError, match="strict='yes' must be True or False"):
        MemoryAudit(strict="yes")


def two_ranks(rank: int, strict: bool) -> Any:
    class Uneven(LitLM):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_rank == 1:
                self.net.norm.bias.grad = None

    trainer = make_trainer(devices=2, strategy="ddp", callbacks=[MemoryAudit(strict=strict)])
    try:
        trainer.fit(Uneven(), make_loader(batch_size=4))
    except ConfigurationError as error:
        return str(error)
    return read(trainer)["gradients"][0]["status"]


def test_ranks_stop_together(ranks):
    first, second = ranks(two_ranks, True)
    assert first == "MemoryAudit(strict=True): another rank found a problem; see its message."
    assert "1 of 28 trainable tensors got no gradient: net.norm.bias" in second
    assert ranks(two_ranks, False) == ["ok", "ok"]  # rank zero writes what it saw itself
