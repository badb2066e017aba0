"""What other people's checkpoints of state spaces, and of hybrids of these and attention, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edgellm.models.foreign import (
    GGUF,
    GGUF_KEYS,
    GGUF_PARTS,
    GGUF_TENSORS,
    MAX_LAYERS,
    METADATA,
    Fields,
    Key,
    Names,
    Values,
    Variant,
    checked_kinds,
    checked_whole,
    flag,
    has,
    neutral,
    positive,
    refuse,
    whole,
)

__all__ = [
    "BACKBONE_KEYS", "BACKBONE_PARTS", "inner_features", "mixer_keys", "mixer_parts", "no_step_limit", "pattern_key",
    "space_gguf", "time_step_rank",
]  # fmt: skip

BACKBONE_PARTS: Mapping[str, str] = {
    "embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head", "mixer_norm": "norm",
}  # fmt: skip


def mixer_parts(ours: str, theirs: str) -> Mapping[str, str]:
    """What a state space's parameters are called.

    Args:
        ours: our name of the mixer.
        theirs: the file's.
    """
    parts = {"conv": "conv1d", "dt_offset": "dt_bias", "a_log": "A_log", "d": "D", "norm": "norm.weight"}
    named = {part: part for part in ("in_proj", "x_proj", "dt_proj", "out_proj")} | parts
    return {f"{ours}.{part}": f"{theirs}.{name}" for part, name in named.items()}


def inner_features(name: str, values: Values, fields: Fields) -> None:
    """So many widths of features as the key says."""
    fields["inner"] = fields["width"] * checked_whole(name, values.get(name, 2))


def time_step_rank(name: str, values: Values, fields: Fields) -> None:
    """Features of dt; a sixteenth of the width where the file leaves it to the code."""
    rank = values.get(name, "auto")
    fields["rank"] = -(-fields["width"] // 16) if rank == "auto" else checked_whole(name, rank)


def no_step_limit(name: str, values: Values, fields: Fields) -> None:
    """A key that would bound dt, and must leave it free."""
    neutral([0.0, float("inf")], [0.0, {"__float__": "Infinity"}], None)(name, values, fields)


def mixer_keys(*, inner: int | None = None) -> Mapping[str, Key]:
    """The keys of a state space whose names begin with ``mamba_``; the field ``width`` was read before.

    Args:
        inner: features of all its heads, where the file does not say; None for so many widths as it expands to.
    """

    def head_dim(name: str, values: Values, fields: Fields) -> None:
        features, heads = values.get("mamba_d_ssm", inner), fields["space_heads"]
        if features is None:
            features = fields["width"] * checked_whole("mamba_expand", values.get("mamba_expand", 2))
        else:
            checked_whole("mamba_d_ssm", features)
        size = values.get(name, "auto")
        fields["space_head_dim"] = features // heads if size == "auto" else checked_whole(name, size)
        if fields["space_head_dim"] * heads != features:
            raise refuse(name, size)

    return {
        "mamba_n_heads": whole("space_heads", default=128),
        "mamba_d_head": head_dim,
        "mamba_d_state": whole("state_size", default=256),
        "mamba_n_groups": whole("num_groups", default=1),
        "mamba_d_conv": whole("conv_taps", default=4),
        "mamba_conv_bias": flag("conv_bias", default=True),
        "mamba_proj_bias": flag("space_bias", default=False),
        "mamba_expand": METADATA,
        "mamba_chunk_size": METADATA,
        "time_step_limit": no_step_limit,
    }


def pattern_key(kinds: Mapping[str, str]) -> Key:
    """The layers' mixers, into the field ``pattern``; where the file names none, all have the first.

    Args:
        kinds: from the file's names of them, older ones included, to ours.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        named = values.get(name)
        said = values.get("num_hidden_layers", len(named) if isinstance(named, list) else 32)
        layers = checked_whole("num_hidden_layers", said, MAX_LAYERS)
        named = [next(iter(kinds))] * layers if named is None else named
        fields["pattern"] = tuple(kinds[kind] for kind in checked_kinds(name, named, kinds, layers))

    return take


BACKBONE_KEYS: Mapping[str, Key] = {
    "conv_kernel": whole("conv_taps", default=4),
    "use_conv_bias": flag("conv_bias", default=True),
    "use_bias": flag("bias", default=False),
    "layer_norm_epsilon": positive("norm_eps", default=1e-5),
    "hidden_act": neutral("silu", "swish"),
}
_GGUF_KEYS: Mapping[str, Key] = {
    **{name: GGUF_KEYS[name] for name in ("block_count", "context_length", "embedding_length")},
    "ssm.state_size": whole("state_size"),
    "ssm.conv_kernel": whole("conv_taps"),
    "attention.layer_norm_rms_epsilon": GGUF_KEYS["attention.layer_norm_rms_epsilon"],
    **dict.fromkeys(("feed_forward_length", "attention.head_count", "attention.head_count_kv"), neutral(0)),
}
_GGUF_PARTS: Mapping[str, str] = {
    **GGUF_PARTS,
    "mixer.in_proj": "ssm_in",
    "mixer.conv": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.dt_offset": "ssm_dt.bias",
    "mixer.a_log": "ssm_a",
    "mixer.d": "ssm_d",
    "mixer.norm": "ssm_norm.weight",
    "mixer.out_proj": "ssm_out",
}
_GGUF_TENSORS = {
    **GGUF_TENSORS,
    "conv_bias": has("blk.0.ssm_conv1d.bias"),
    "bias": has("blk.0.ssm_in.bias"),
}


def _decay(_config: Any, _metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """GGUF files have A itself, below 0, and we the logarithm of -A."""
    return (-tensor).log() if name.endswith("a_log") else tensor


def space_gguf(name: str, keys: Mapping[str, Key], *, reshaped: tuple[str, ...]) -> GGUF:
    """How GGUF files of state spaces alone are read.

    Args:
        name: of the foreign architecture.
        keys: its own, besides those that all have.
        reshaped: as :class:`GGUF`'s.
    """
    return GGUF(
        types={name: Variant()}, keys={**_GGUF_KEYS, **keys}, names=Names(_GGUF_PARTS, layers="blk"),
        tensors=_GGUF_TENSORS, tensor=_decay, reshaped=reshaped,
    )  # fmt: skip
