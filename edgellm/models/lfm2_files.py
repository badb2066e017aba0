"""How other people's checkpoints of LFM2 are read: their keys, names and layouts."""

from __future__ import annotations

from edgellm.models.foreign import (
    GGUF,
    GGUF_KEYS,
    GGUF_PARTS,
    GGUF_TENSORS,
    HUGGING_FACE_PARTS,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    checked_kinds,
    checked_positive,
    checked_whole,
    flag,
    positive,
    refuse,
    rotary,
    usual_keys,
    whole,
    width_by_heads,
)

__all__ = ["GGUF_FILES", "HUGGING_FACE"]


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """Each layer's mixer: by ``layer_types``, or by the numbers of those with attention."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 32), MAX_LAYERS)
    kinds, attentive = values.get(name), values.get("full_attn_idxs")
    if kinds is None:
        attentive = range(count) if attentive is None else attentive
        kinds = ["full_attention" if i in attentive else "conv" for i in range(count)]
    kinds = checked_kinds(name, kinds, ("conv", "full_attention"), count)
    fields["pattern"] = tuple("conv" if kind == "conv" else "attention" for kind in kinds)


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    """Two thirds of what the file says, by a factor, rounded up to a multiple; unless it asks for the very number."""
    key = "block_ff_dim" if "block_ff_dim" in values else name
    size = checked_whole(key, values.get(key, 12288))
    if values.get("block_auto_adjust_ff_dim", True):
        size = int(2 * size / 3)
        if (factor := values.get("block_ffn_dim_multiplier", 1.0)) is not None:
            multiple = checked_whole("block_multiple_of", values.get("block_multiple_of", 256))
            size = -(-int(checked_positive("block_ffn_dim_multiplier", factor) * size) // multiple) * multiple
    fields["mlp_width"] = size


def _tied(name: str, values: Values, fields: Fields) -> None:
    flag("tie_embeddings", default=True)("tie_embedding" if "tie_embedding" in values else name, values, fields)


_SIZES = usual_keys(
    vocab_size=65536, width=2560, num_heads=32, num_kv_heads=8, head_dim=width_by_heads, max_context=128000,
)  # fmt: skip
_UNREAD = (  # by transformers; the rest of the file says the same, or they are of training, or read by other keys
    "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
    "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta", "use_pos_enc",
    "num_hidden_layers", "full_attn_idxs", "tie_embedding", "block_ff_dim", "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier", "block_multiple_of",
)  # fmt: skip
_PARTS = {
    **HUGGING_FACE_PARTS,
    "norm": "model.embedding_norm",
    "mixer_norm": "operator_norm",
    "mixer.in_proj": "conv.in_proj",
    "mixer.conv": "conv.conv",
    "mixer.out_proj": "conv.out_proj",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.o_proj": "self_attn.out_proj",
    "mixer.q_norm": "self_attn.q_layernorm",
    "mixer.k_norm": "self_attn.k_layernorm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}

HUGGING_FACE = HuggingFace(
    types={"lfm2": Variant()},
    keys={
        **_SIZES,
        "layer_types": _pattern,
        "intermediate_size": _mlp_width,
        "conv_L_cache": whole("conv_taps", default=3),
        "conv_bias": flag("conv_bias", default=False),
        **rotary(theta=1000000.0),
        "norm_eps": positive("norm_eps", default=1e-5),
        "tie_word_embeddings": _tied,
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
)


def _gguf_pattern(name: str, values: Values, fields: Fields) -> None:
    """A number of key and value heads for each layer: 0 of those with a convolution."""
    heads, count = values.get(name), checked_whole("block_count", values.get("block_count"), MAX_LAYERS)
    if not isinstance(heads, list) or len(heads) != count or any(type(n) is not int or n < 0 for n in heads):
        raise refuse(name, heads)
    if len(kinds := {n for n in heads if n}) > 1:
        raise refuse(name, heads)
    fields["num_kv_heads"] = kinds.pop() if kinds else fields["num_heads"]
    fields["pattern"] = tuple("attention" if n else "conv" for n in heads)


_GGUF_PARTS = {
    **{ours.replace("attention.", "mixer."): name for ours, name in GGUF_PARTS.items()},
    "norm": "token_embd_norm",
    "mixer.in_proj": "shortconv.in_proj",
    "mixer.conv": "shortconv.conv",
    "mixer.out_proj": "shortconv.out_proj",
}

GGUF_FILES = GGUF(
    types={"lfm2": Variant()},
    keys={
        **GGUF_KEYS,
        "block_count": METADATA,  # read with the pattern
        "attention.head_count_kv": _gguf_pattern,
        "rope.freq_base": positive("rope_theta", default=1000000.0),
        "shortconv.l_cache": whole("conv_taps"),
    },
    names=Names(_GGUF_PARTS, layers="blk"),
    tensors={
        **GGUF_TENSORS,
        "conv_bias": lambda shapes: any(name.endswith("shortconv.in_proj.bias") for name in shapes),
    },
    reshaped=("mixer.conv.weight",),
)
