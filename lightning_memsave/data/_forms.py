"""Which form of a packed batch a model of transformers needs."""

from __future__ import annotations

from typing import Any

from lightning_memsave.errors import ConfigurationError

__all__ = ["FORMS", "IGNORES_POSITIONS", "RECURRENT", "choose_form", "forms_for"]

FORMS = ("auto", "positions", "flash", "mask", "additive", "documents")

# Model types whose layers carry a state along the row, whatever the mask.
RECURRENT = {
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "recurrent_gemma",
    "rwkv", "xlstm", "zamba", "zamba2",
}  # fmt: skip
# Other model types whose own masks are built without position_ids, in transformers 4.57 or 5.23 (read from their
# sources; a test reads those of the installed version again). Only a mask from outside keeps their documents apart.
IGNORES_POSITIONS = {
    "afmoe", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
    "blenderbot-small", "bloom", "blt", "camembert", "codegen", "cpmant", "ctrl", "data2vec-text", "dbrx",
    "electra", "ernie", "falcon", "fuyu", "gemma4_assistant", "gemma4_unified_assistant", "git", "got_ocr2",
    "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granitemoe", "granitemoeshared", "jetmoe", "marian",
    "mbart", "megatron-bert", "mllama", "moshi", "moss_transcribe_diarize", "mpt", "musicgen",
    "musicgen_melody", "mvp", "nemotron", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon", "phimoe",
    "plbart", "prophetnet", "qwen2_moe", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "stablelm", "trocr", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip


def choose_form(attention: str, config: Any, causal: bool) -> str:
    """Return the form of a batch: one of ``FORMS``, or ``any`` (positions and flash's lengths).

    Raises:
        ConfigurationError: If no form is known to be right for a model of this ``config``.

    """
    config = _text_config(config)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if attention in {"mask", "additive"}:
        _refuse_window(attention, window)
    if attention != "auto":
        return attention
    if config is None:
        return "any" if causal else "mask"
    kind = getattr(config, "model_type", type(config).__name__)
    if kind in RECURRENT or not all(map(_attends, getattr(config, "layer_types", None) or ())):
        raise ConfigurationError(
            f"PackingCollator: {kind} has layers that carry a state from one document to the next. If its "
            "kernels reset it, write the form yourself, e.g. attention='flash', and run check(model); otherwise use "
            "LengthGroupedSampler instead of packing."
        )
    implementation = _implementation(config)
    if "flash" in implementation:
        return "flash"
    by_position = causal and kind not in IGNORES_POSITIONS
    if by_position and implementation in {"sdpa", "eager", "flex_attention"}:
        return "any"
    if implementation in {"sdpa", "eager"}:
        form = {"sdpa": "mask", "eager": "additive"}[implementation]
        _refuse_window(form, window)
        return form
    raise ConfigurationError(
        f"PackingCollator: no form of a batch is known for {kind} with attn_implementation="
        f"{implementation!r}{'' if causal else ' and causal=False'}; load the model with attn_implementation='sdpa'."
    )


def forms_for(config: Any, causal: bool) -> list[Any]:
    """Return the forms to try, lightest first."""
    flash = "flash" in _implementation(_text_config(config))
    return [*(["flash"] if flash else []), *(["auto", "positions"] if causal else []), "mask", "additive"]


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _implementation(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", None) or "eager")


def _refuse_window(form: str, window: int | None) -> None:
    if window:
        raise ConfigurationError(
            f"PackingCollator: a mask (attention={form!r}) with a model of sliding_window={window} takes the place of "
            "the window's. Write attention='positions', under which most models build both, and run check(model)."
        )


def _attends(kind: str) -> bool:
    return kind.endswith("attention") and "linear" not in kind
