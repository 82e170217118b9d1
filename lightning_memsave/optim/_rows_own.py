"""The optimizers that are written here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memsave.optim._adamw_rule import adamw_state_bytes
from lightning_memsave.optim._codecs import FOUR_BITS, FP8
from lightning_memsave.optim._factored import factored_state_bytes
from lightning_memsave.optim._low_rank import is_low_rank, low_rank_state_bytes
from lightning_memsave.optim._row import Group, OptimizerRow, family_of, with_tuples
from lightning_memsave.optim.adafactor import Adafactor, AdaLomo
from lightning_memsave.optim.adam_mini import AdamMini, adam_mini_state_bytes
from lightning_memsave.optim.adamw_narrow import AdamW4bit, AdamWFp8, is_narrow, narrow_state_bytes
from lightning_memsave.optim.apollo import ApolloAdamW
from lightning_memsave.optim.came import CAME
from lightning_memsave.optim.galore import GaLoreAdamW
from lightning_memsave.optim.muon import Muon, muon_state_bytes
from lightning_memsave.optim.per_parameter import PerParameterOptimizer
from lightning_memsave.optim.split_master import SplitMasterAdamW, has_narrow_moments, split_master_state_bytes

__all__ = ["ROWS"]

Options = Mapping[str, Any]
_ADAM = ("betas", "eps")


def _builder(cls: Callable[..., Optimizer], *, names_kept: bool = False) -> Callable[..., Optimizer]:
    def build(groups: Sequence[Group], options: Options, keep_32bit: Collection[int]) -> Optimizer:
        return cls(groups, **with_tuples(options), **({"keep_32bit": keep_32bit} if names_kept else {}))

    return build


def _row(cls: type[PerParameterOptimizer], *, names_kept: bool = False, **fields: Any) -> OptimizerRow:
    return OptimizerRow(
        title=cls.__name__,
        build=_builder(cls, names_kept=names_kept),
        library="lightning_memsave",
        maximizes=True,
        **fields,
    )


# -- hyper-parameters of an old optimizer ------------------------------------------------------------------------------
def _adafactor_options(old: Optimizer, group: Mapping[str, Any]) -> Group:
    """Return what another Adafactor's options mean here; torch's names differ and it always scales by the weights."""
    if isinstance(old, torch.optim.Adafactor):
        return {
            "eps": (1e-30, group["eps"][1]),  # its first eps bounds another quantity
            "clip_threshold": group["d"],
            "decay_rate": group["beta2_decay"],
            "scale_parameter": True,
        }
    names = ("eps", "clip_threshold", "decay_rate", "beta1", "scale_parameter")
    return {name: group[name] for name in names if name in group} if family_of(old) == "adafactor" else {}


def _adalomo_options(old: Optimizer, group: Mapping[str, Any]) -> Group:
    dropped = ("beta1", "scale_parameter")
    return {name: value for name, value in _adafactor_options(old, group).items() if name not in dropped}


def _muon_options(old: Optimizer, group: Mapping[str, Any]) -> Group:
    """Return the betas of Adam for what AdamW steps, or the options of another Muon."""
    if family_of(old) == "adam":
        return {name: tuple(group[name]) if name == "betas" else group[name] for name in _ADAM if name in group}
    if family_of(old) != "muon":
        return {}
    kept = {name: group[name] for name in ("momentum", "nesterov", "ns_steps") if name in group}
    return {**kept, "adjust_lr_fn": group.get("adjust_lr_fn") or "original"}


# -- rows --------------------------------------------------------------------------------------------------------------
def _galore_rank(options: Options) -> int:
    rank: int = options.get("rank", 128)
    return rank


def _apollo_rank(options: Options) -> int:
    rank: int = options.get("rank", 256)
    return rank


def _is_matrix(p: Tensor, keeps_32bit: bool, options: Options) -> bool:
    return p.ndim >= 2 and not keeps_32bit


_FACTORS = "4 (rows + columns) / (rows * columns)"
_LOW_RANK_NOTE = "it sees gradients through a projection of rank `rank`"

ROWS = (
    _row(
        AdamW4bit,
        names_kept=True,
        name="adamw_4bit",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "weight_decay"),
        state_bytes=lambda p, kept, _: narrow_state_bytes(p, kept, FOUR_BITS),
        reaches=lambda p, kept, _: is_narrow(p, kept),
        state="1 + 8/128",
        numerics="AdamW, moments of 16 levels, a scale every 128 values",
        source="Li et al. 2023, https://arxiv.org/abs/2309.01507",
        bits=4,
    ),
    _row(
        AdamWFp8,
        names_kept=True,
        name="adamw_fp8",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "weight_decay"),
        state_bytes=lambda p, kept, _: narrow_state_bytes(p, kept, FP8),
        reaches=lambda p, kept, _: is_narrow(p, kept),
        state="2 + 8/256",
        numerics="AdamW, moments in fp8 (e4m3), a scale every 256 values",
        source="Peng et al. 2023, https://arxiv.org/abs/2310.18313",
        bits=8,
    ),
    _row(
        SplitMasterAdamW,
        names_kept=True,
        name="adamw_split_master",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "correction", "min_8bit_size", "weight_decay"),
        state_bytes=split_master_state_bytes,
        reaches=has_narrow_moments,
        state="2 + 8/256",
        master="1 (int16: 2)",
        numerics="AdamW on bf16 weights with fp32 masters to 1.5e-5, 8-bit moments rounded by chance",
        source="FlashOptim 2026, https://arxiv.org/abs/2602.23349",
        bits=8,
    ),
    _row(
        Adafactor,
        name="adafactor",
        family="adafactor",
        shared=(),
        carry=_adafactor_options,
        options=("beta1", "clip_threshold", "decay_rate", "eps", "scale_parameter", "weight_decay"),
        state_bytes=lambda p, _, options: (
            factored_state_bytes(p) + (0 if options.get("beta1") is None else adamw_state_bytes(p) // 2)
        ),
        state=_FACTORS,
        numerics="Adafactor: one second moment a row and a column, no first moment; the rule of HF's Trainer",
        source="Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235",
        rule_note=(
            "a step has the size of the learning rate, as under HF's Trainer; options={'scale_parameter': True} "
            "multiplies it by the size of the weights, as in the paper"
        ),
    ),
    _row(
        AdaLomo,
        name="adalomo",
        family="adafactor",
        shared=(),
        carry=_adalomo_options,
        options=("clip_threshold", "decay_rate", "eps", "weight_decay"),
        state_bytes=lambda p, _keeps, _options: factored_state_bytes(p),
        state=_FACTORS,
        numerics="Adafactor with steps scaled by the size of the weights; with GradientRelease it is AdaLOMO",
        source="Lv et al. 2023, https://arxiv.org/abs/2310.10195",
        same_rule=False,
        rule_note=(
            "AdaLOMO scales each step by the size of the weights and wants a larger learning rate than AdamW (near "
            "1e-3 for fine-tuning); it was kept"
        ),
    ),
    _row(
        CAME,
        name="came",
        family="came",
        shared=("betas", "eps", "clip_threshold"),
        options=("betas", "clip_threshold", "eps", "weight_decay"),
        state_bytes=lambda p, _keeps, _options: (
            adamw_state_bytes(p) // 2 + factored_state_bytes(p) * (1 if p.ndim < 2 else 2)
        ),
        state="4 + 8 (rows + columns) / (rows * columns)",
        numerics="CAME: a first moment over two factored second moments",
        source="Luo et al. 2023, https://arxiv.org/abs/2307.02047",
        rule_note="CAME wants a learning rate of about half of AdamW's; it was kept",
    ),
    _row(
        AdamMini,
        name="adam_mini",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "weight_decay"),
        state_bytes=lambda p, _keeps, _options: adam_mini_state_bytes(p),
        state="4 + 4 / columns",
        numerics="AdamW with one second moment a row",
        source="Zhang et al. 2024, https://arxiv.org/abs/2406.16793",
        same_rule=False,
        rule_note="Adam-mini takes AdamW's learning rate",
    ),
    _row(
        Muon,
        names_kept=True,
        name="muon",
        family="muon",
        shared=(),
        carry=_muon_options,
        options=(*_ADAM, "adjust_lr_fn", "momentum", "nesterov", "ns_steps", "weight_decay"),
        state_bytes=lambda p, kept, _: muon_state_bytes(p, kept),
        reaches=_is_matrix,
        state="4 (AdamW for embeddings, norms, heads, vectors: 8)",
        numerics="Muon: steps along an orthogonalized momentum",
        source="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon",
        matrices_only=True,
        rule_note="Muon's steps have the size of AdamW's, so its learning rate was kept",
    ),
    _row(
        GaLoreAdamW,
        names_kept=True,
        name="galore_adamw",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "rank", "scale", "update_proj_gap", "weight_decay"),
        state_bytes=lambda p, kept, options: low_rank_state_bytes(
            p, _galore_rank(options), kept, stores_projection=True
        ),
        reaches=lambda p, kept, options: is_low_rank(p, _galore_rank(options), kept),
        state="rank (8 longer + 4 shorter) / (rows * columns) (AdamW for embeddings, norms, heads, vectors: 8)",
        numerics="AdamW in the space of the gradient's largest singular vectors",
        source="Zhao et al. 2024, https://arxiv.org/abs/2403.03507",
        matrices_only=True,
        same_rule=False,
        rule_note=(
            f"{_LOW_RANK_NOTE}, and its steps are `scale` (0.25) of AdamW's, so that it wants a larger learning rate; "
            "it was kept"
        ),
    ),
    _row(
        ApolloAdamW,
        names_kept=True,
        name="apollo_adamw",
        family="adam",
        shared=_ADAM,
        options=(*_ADAM, "per_channel", "rank", "scale", "seed", "update_proj_gap", "weight_decay"),
        state_bytes=lambda p, kept, options: low_rank_state_bytes(
            p, _apollo_rank(options), kept, stores_projection=False
        ),
        reaches=lambda p, kept, options: is_low_rank(p, _apollo_rank(options), kept),
        state="8 rank longer / (rows * columns) (AdamW for embeddings, norms, heads, vectors: 8)",
        numerics="gradients scaled channel by channel as AdamW would in a random projection",
        source="Zhu et al. 2024, https://arxiv.org/abs/2412.05270",
        matrices_only=True,
        same_rule=False,
        rule_note=f"{_LOW_RANK_NOTE}; the learning rate was kept",
    ),
)
