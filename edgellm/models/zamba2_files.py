"""How other people's checkpoints of Zamba2 are read: their keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    ATTENTION_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    alike,
    as_many_heads,
    checked_whole,
    flag,
    hidden_act,
    neutral,
    positive,
    refuse,
    rotary,
    usual_keys,
    whole,
)
from edgellm.models.state_spaces_files import mixer_parts, pattern_key

__all__ = ["HUGGING_FACE"]

_KINDS = {"linear_attention": "space", "mamba": "space", "hybrid": "shared"}


def _biases(name: str, values: Values, fields: Fields) -> None:
    """One key for all projections of state spaces and MLPs."""
    flag("mlp_bias", default=False)(name, values, fields)
    fields["space_bias"] = fields["mlp_bias"]


def _head_dim(_name: str, _values: Values, fields: Fields) -> None:
    """Heads of attention divide twice the width, whatever the file says."""
    fields["head_dim"] = 2 * fields["width"] // fields["num_heads"]


def _inner(name: str, values: Values, fields: Fields) -> None:
    """Features of a head of the state space: what it expands to, divided."""
    inner, heads = fields["width"] * checked_whole(name, values.get(name, 2)), fields["space_heads"]
    if inner % heads:
        raise refuse("n_mamba_heads", heads)
    fields["space_head_dim"] = inner // heads


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """The layers' kinds; where the file names none, those of the first of these models."""
    six = ["mamba"] * 5 + ["hybrid"]
    first = ["mamba", *six * 7, *["mamba"] * 4, "hybrid", *["mamba"] * 3, "hybrid", *["mamba"] * 2]
    pattern_key(_KINDS)(name, {name: values.get(name) or first}, fields)


_UNREAD = (  # of training, of kernels, or computed anew from other keys
    "num_hidden_layers", "hybrid_layer_ids", "attention_hidden_size", "kv_channels",
    "mamba_headdim", "num_query_groups", "time_step_max", "time_step_floor", "use_mamba_kernels", "use_conv_bias",
    "chunk_size", "use_mem_eff_path", "num_logits_to_keep", "head_dim",
)  # fmt: skip
_SIZES = usual_keys(
    vocab_size=32000, width=2560, num_heads=32, num_kv_heads=as_many_heads,
    mlp_width=lambda fields: 4 * fields["width"], max_context=4096, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
_PARTS = {
    "embedding": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "head": "lm_head",
    "mixer_norm": "input_layernorm",
    **mixer_parts("space", "mamba"),
    "linear": "linear",
    "inner.mixer_norm": "mamba_decoder.input_layernorm",
    **mixer_parts("inner.space", "mamba_decoder.mamba"),
    "shared.norm": "shared_transformer.input_layernorm",
    "shared.mlp_norm": "shared_transformer.pre_ff_layernorm",
    **alike("shared.attention", "shared_transformer.self_attn", *ATTENTION_PARTS),
    **{
        f"shared.attention.{x}_changes.*.{i}": f"shared_transformer.self_attn.linear_{x}_adapter_list.*.{i}"
        for x in "qkv"
        for i in range(2)
    },
    "shared.in_proj": "shared_transformer.feed_forward.gate_up_proj",
    "shared.out_proj": "shared_transformer.feed_forward.down_proj",
    **{f"shared.changes.*.{i}": f"shared_transformer.feed_forward.gate_up_proj_adapter_list.*.{i}" for i in range(2)},
}

HUGGING_FACE = HuggingFace(
    types={"zamba2": Variant()},
    keys={
        **_SIZES,
        "layers_block_type": _pattern,
        "attention_head_dim": _head_dim,
        "use_long_context": neutral(False, None),
        "n_mamba_heads": whole("space_heads", default=8),
        "mamba_expand": _inner,
        "mamba_d_state": whole("state_size", default=64),
        "mamba_ngroups": whole("num_groups", default=1),
        "mamba_d_conv": whole("conv_taps", default=4),
        "add_bias_linear": _biases,
        "num_mem_blocks": whole("num_blocks", default=1),
        "adapter_rank": whole("rank", default=128),
        "use_shared_attention_adapter": flag("attention_changes", default=False),
        "use_mem_rope": flag("rotates", default=False),
        **rotary(),
        "time_step_min": positive("least_step", default=0.001),
        "hidden_act": hidden_act(default="gelu"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
)
