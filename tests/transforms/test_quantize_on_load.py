"""Quantizing while transformers loads: heads stay, bits equal quantizing afterwards, host memory stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from lightning_memsave import LoRA, QLoRA, WeightQuantization, apply
from lightning_memsave.errors import ConfigurationError
from lightning_memsave.transforms.quantization import KINDS

IDS = torch.arange(24).view(2, 12) % 64


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**shape, "vocab_size": 64, "pad_token_id": 0, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved language model with random weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(module: nn.Module) -> Tensor:
    return module.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_quantized_while_loading_is_the_one_quantized_afterwards(kind: str, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    saver = QLoRA(kind=kind)
    module = LlamaForCausalLM.from_pretrained(folder, quantization_config=saver.loading_config(), dtype="auto")
    assert not module.model.layers[0].mlp.up_proj.weight.is_floating_point()
    assert type(module.lm_head) is nn.Linear
    entries = list(apply(module, [saver]))
    assert entries[0][1].summary == f"14 linear weights were {kind} already"
    later = LlamaForCausalLM.from_pretrained(folder)
    apply(later, [saver])
    assert torch.equal(logits(module), logits(later))
    module.train()(IDS).logits.sum().backward()
    assert sum(p.grad is not None for p in module.parameters()) == 2 * 14


def test_the_wrong_pair_of_loader_and_callback_is_refused(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(folder, quantization_config=QLoRA(kind="fp4").loading_config())
    with pytest.raises(ConfigurationError, match="it is fp4 already, and nf4 was asked for; write kind='fp4'"):
        apply(module, [QLoRA()])
    with pytest.raises(ConfigurationError, match=r"skip= selects model\.layers\.0\.mlp\.up_proj.* loading_config"):
        apply(module, [WeightQuantization("fp4", skip="*.up_proj"), LoRA()])


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_a_classifier_is_not_quantized_and_trains(head: str, tmp_path: Path) -> None:
    # transformers alone quantizes the classifier of a BERT (its last parameter is a bias, which it does not find)
    from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

    bert = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    cls, config = {
        "score": (LlamaForSequenceClassification, llama()),
        "classifier": (BertForSequenceClassification, bert),
    }[head]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "model")
    saver = QLoRA(rank=4, train=f"net.{head}")
    module = nn.Module()
    module.net = cls.from_pretrained(tmp_path / "model", quantization_config=saver.loading_config(), dtype="auto")
    assert type(module.net.get_submodule(head)) is nn.Linear
    apply(module, [saver])
    module.net(IDS).logits.sum().backward()
    trained = {n for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {n for n, _ in module.named_parameters() if n.startswith(f"net.{head}.")}
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_skip_and_train_reach_the_loader(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    saver = WeightQuantization(skip=["net.model.layers.0", "*.down_proj"])
    module = LlamaForCausalLM.from_pretrained(folder, quantization_config=saver.loading_config(), dtype="auto")
    packed = {n for n, p in module.named_parameters() if not p.is_floating_point()}
    assert packed == {
        f"model.layers.1.{n}.weight"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        + ("mlp.gate_proj", "mlp.up_proj")
    }


_LOAD = """
import json, sys, threading, time
import torch
from transformers import LlamaForCausalLM
from lightning_memsave import QLoRA

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

kind, warm, folder = sys.argv[1:]
config = QLoRA(kind=kind).loading_config()
LlamaForCausalLM.from_pretrained(warm, quantization_config=config)  # imports and pools are no part of the model
start, peak, done = anonymous_bytes(), [0], []

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
done.append(True)
thread.join()
held = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": peak[0] - start, "held": held}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which this system does not have")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_host_memory_never_holds_the_full_model(kind: str, folder: Path, tmp_path: Path) -> None:
    import transformers
    from transformers import LlamaForCausalLM

    big = LlamaForCausalLM(llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4))
    big.save_pretrained(tmp_path / "big")
    full = sum(p.nbytes for p in big.parameters())
    largest = max(p.nbytes for p in big.parameters())
    del big
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _LOAD, kind, str(folder), str(tmp_path / "big")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # of 200 MiB in full and 11 MiB in the largest weight; worst seen above what is held: 20 MiB, 41 by transformers 4
    copies = 2.5 if Version(transformers.__version__) >= Version("5") else 4.5
    assert found["peak"] <= found["held"] + copies * largest
    assert found["peak"] < 0.4 * full
