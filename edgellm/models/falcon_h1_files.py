"""How other people's checkpoints of Falcon-H1 are read: their keys and names, and scales that go into the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgellm.errors import CheckpointError
from edgellm.models.foreign import (
    FEED_FORWARD_PARTS,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    checked_flag,
    flag,
    hidden_act,
    positive,
    rotary,
    usual_keys,
    width_by_heads,
)
from edgellm.models.layers.state_space import GATED_NORMS
from edgellm.models.state_spaces import HybridShape
from edgellm.models.state_spaces_files import mixer_keys, mixer_parts

__all__ = ["HUGGING_FACE"]

_SCALES: Mapping[str, tuple[str, str]] = {  # what multiplies the input and the output of a projection
    "attention.q_proj": ("attention_in_multiplier", ""),
    "attention.k_proj": ("attention_in_multiplier", "key_multiplier"),
    "attention.v_proj": ("attention_in_multiplier", ""),
    "attention.o_proj": ("", "attention_out_multiplier"),
    "space.out_proj": ("", "ssm_out_multiplier"),
}


def _with_scales(config: HybridShape, values: Values, name: str, stored: Tensor) -> Tensor:
    """A projection times what the file multiplies its input and its output by; its bias by the latter alone."""
    part, _, kind = name.partition("layers.")[2].partition(".")[2].rpartition(".")
    before, after = (float(values.get(key) or 1) if key else 1.0 for key in _SCALES.get(part, ("", "")))
    if part in ("mlp.gate_proj", "mlp.down_proj"):
        after = float((values.get("mlp_multipliers") or (1, 1))[part == "mlp.down_proj"])
    if part == "space.in_proj":
        inner, keys = config.space_heads * config.space_head_dim, config.num_groups * config.state_size
        sizes, each = [inner, inner, keys, keys, config.space_heads], values.get("ssm_multipliers") or [1] * 5
        if set(each) != {1}:
            stored = torch.cat([rows * x for rows, x in zip(torch.split(stored, sizes), each, strict=True)])
        before = float(values.get("ssm_in_multiplier") or 1)
    scale = before * after if kind == "weight" else after
    return stored if scale == 1 else stored * scale


def _numbers(count: int) -> Key:
    """Numbers that go into the weights."""

    def take(name: str, values: Values, _fields: Fields) -> None:
        given: Any = values.get(name)
        each: Sequence[Any] = [given] if count == 1 else given if isinstance(given, Sequence) else [given]
        if given is not None and not (len(each) == count and all(_is_number(x) for x in each)):
            raise CheckpointError(f"{name} is {given!r}; it must be {count} finite numbers other than 0")

    return take


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x) and x != 0


def _space_norm(name: str, values: Values, fields: Fields) -> None:
    first = checked_flag("mamba_norm_before_gate", values.get("mamba_norm_before_gate", True))
    fields["space_norm"] = GATED_NORMS[first] if checked_flag(name, values.get(name, False)) else "none"


_SIZES = usual_keys(
    vocab_size=128000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=width_by_heads,
    mlp_width=14336, max_context=8192, norm_eps=1e-5, tie_embeddings=False, attention_bias=False,
    mlp_bias=False,
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"falcon_h1": Variant()},
    keys={
        **_SIZES,
        **mixer_keys(inner=1024),
        **rotary(),
        "hidden_act": hidden_act(),
        "mamba_rms_norm": _space_norm,
        "projectors_bias": flag("space_output_bias", default=False),
        "embedding_multiplier": positive("embedding_scale", default=1.0),
        "lm_head_multiplier": positive("logit_scale", default=1.0),
        **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"), _numbers(1)),
        **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), _numbers(1)),
        "mlp_multipliers": _numbers(2),
        "ssm_multipliers": _numbers(5),
    },
    names=Names({**FEED_FORWARD_PARTS, **mixer_parts("space", "mamba")}, layers="model.layers"),
    unread=("mamba_d_ssm", "mamba_norm_before_gate", "num_logits_to_keep", "mamba_use_mlp"),
    tensor=_with_scales,
)
