"""How other people's checkpoints of the Llama-style decoder are read: their types, keys and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from edgellm.models.foreign import (
    GGUF,
    GGUF_PARTS,
    HUGGING_FACE_PARTS,
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    flag,
    full_attention,
    has,
    hidden_act,
    lacks,
    neutral,
    no_window,
    positive,
    refuse,
    rotary,
    rows_of,
    same_as,
    whole,
    windows,
)
from edgellm.models.foreign.keys import checked_positive, checked_whole
from edgellm.models.layers.rotary import order_of_part

__all__ = ["GGUF_FILES", "HUGGING_FACE"]


class _Sizes(Protocol):
    """What layouts depend on, of the decoder's configuration, which knows this file."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def turning(self) -> int: ...


def _same_heads(fields: Fields) -> int:
    return int(fields["num_heads"])


def _divided(fields: Fields) -> int:
    return int(fields["width"] // fields["num_heads"])


def _every_bias(name: str, values: Values, fields: Fields) -> None:
    """Of this type the key means all four projections."""
    flag("attention_bias", default=False)(name, values, fields)
    fields["output_bias"] = fields["attention_bias"]


def _qwen(**keys: Key) -> dict[str, Key]:
    layers = windows(
        default=4096,
        used=lambda values: bool(values.get("use_sliding_window", False)),
        first=("max_window_layers", 28),
    )
    ours = dict.fromkeys(("use_sliding_window", "sliding_window", "max_window_layers"), METADATA)
    return {**ours, "layer_types": layers, **keys}


def _unturned(name: str, values: Values, fields: Fields) -> None:
    """Layers without positions: a list of 0 and 1, or every so many."""
    every = checked_whole("no_rope_layer_interval", values.get("no_rope_layer_interval", 4))
    turns: Any = values.get(name)
    turns = [int((i + 1) % every != 0) for i in range(fields["num_layers"])] if turns is None else turns
    if len(turns) < fields["num_layers"] or any(turn not in (0, 1) for turn in turns):
        raise refuse(name, turns)
    fields["unturned"] = tuple(i for i in range(fields["num_layers"]) if not turns[i])


def _divisor(into: str) -> Key:
    """A number that ours is the inverse of."""

    def take(name: str, values: Values, fields: Fields) -> None:
        fields[into] = 1 / checked_positive(name, values.get(name, 1.0))

    return take


def _in_order(config: _Sizes, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Features of a head in the order that attention turns."""
    if config.turning == config.head_dim or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    heads = tensor.reshape(-1, config.head_dim, *tensor.shape[1:])
    return heads[:, order_of_part(config.head_dim, config.turning)].flatten(0, 1)


def _packed(config: _Sizes) -> Mapping[str, Mapping[str, int]]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
        "mlp.gate_up_proj": {"mlp.gate_proj": config.mlp_width, "mlp.up_proj": config.mlp_width},
    }


_SCALED: Mapping[str, Key] = {
    "num_key_value_heads": whole("num_kv_heads", default=_same_heads),
    "attention_bias": _every_bias,
    "mlp_bias": flag("mlp_bias", default=False),
    "attention_multiplier": positive("attention_scale", default=1.0),
    "embedding_multiplier": positive("embedding_scale", default=1.0),
    "residual_multiplier": positive("residual_scale", default=1.0),
    "logits_scaling": _divisor("logit_scale"),
}
_PACKED: Mapping[str, Key] = {
    "num_key_value_heads": whole("num_kv_heads", default=_same_heads),
    "rms_norm_eps": positive("norm_eps", default=1e-5),
    "sliding_window": METADATA,
    "layer_types": windows(),
    "original_max_position_embeddings": METADATA,  # read with the rotation
    **rotary(share=1.0, synonyms={"su": "longrope", "yarn": "longrope"}),
}
_UNTURNED: Mapping[str, Key] = {
    "no_rope_layers": _unturned,
    "no_rope_layer_interval": METADATA,
    "use_sliding_window": neutral(False, None),
    "sliding_window": METADATA,  # of no use without the key before
    "attention_bias": _every_bias,
    "mlp_bias": flag("mlp_bias", default=False),
    **rotary(theta=2e6),
    "tie_word_embeddings": flag("tie_embeddings", default=True),
}

HUGGING_FACE = HuggingFace(
    types={
        "llama": Variant(
            keys={
                "num_key_value_heads": whole("num_kv_heads", default=_same_heads),
                "attention_bias": _every_bias,
                "mlp_bias": flag("mlp_bias", default=False),
                "is_llama_config": METADATA,
            }
        ),
        "mistral": Variant(keys={"sliding_window": METADATA, "layer_types": windows(default=4096)}),
        "ministral": Variant(keys={"sliding_window": METADATA, "layer_types": windows(default=4096)}),
        "qwen2": Variant(keys=_qwen(attention_bias=METADATA), fields={"attention_bias": True}),
        "qwen3": Variant(
            keys=_qwen(head_dim=whole("head_dim", default=128), attention_bias=_every_bias), fields={"qk_norm": True}
        ),
        "phi3": Variant(keys=_PACKED),
        "granite": Variant(keys=_SCALED),
        "smollm3": Variant(keys=_UNTURNED),
        "seed_oss": Variant(
            keys={
                "head_dim": whole("head_dim", default=128),
                "attention_bias": flag("attention_bias", default=True),
                "attention_out_bias": flag("output_bias", default=False),
                "mlp_bias": flag("mlp_bias", default=False),
            }
        ),
    },
    keys={
        "vocab_size": whole("vocab_size"),
        "hidden_size": whole("width"),
        "num_hidden_layers": whole("num_layers", limit=MAX_LAYERS),
        "num_attention_heads": whole("num_heads"),
        "num_key_value_heads": whole("num_kv_heads"),
        "head_dim": whole("head_dim", default=_divided),
        "intermediate_size": whole("mlp_width"),
        "max_position_embeddings": whole("max_context", limit=MAX_CONTEXT),
        "sliding_window": no_window(),
        "layer_types": full_attention,
        **rotary(),
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": hidden_act(),
    },
    names=Names(HUGGING_FACE_PARTS, layers="model.layers"),
    tensor=_in_order,
    packed=_packed,
)


def _gguf_tensor(config: _Sizes, metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k from neighbouring pairs, as llama.cpp rotates this one architecture, to the two halves."""
    if metadata["general.architecture"] != "llama" or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


GGUF_FILES = GGUF(
    types={"llama": Variant(), "qwen2": Variant(), "qwen3": Variant(fields={"qk_norm": True})},
    keys={
        "block_count": whole("num_layers", limit=MAX_LAYERS),
        "context_length": whole("max_context", limit=MAX_CONTEXT),
        "embedding_length": whole("width"),
        "feed_forward_length": whole("mlp_width"),
        "attention.head_count": whole("num_heads"),
        "attention.head_count_kv": whole("num_kv_heads", default=_same_heads),
        "attention.key_length": whole("head_dim", default=_divided),
        "attention.value_length": same_as("head_dim"),
        "rope.dimension_count": same_as("head_dim"),
        "rope.freq_base": positive("rope_theta", default=10000.0),
        "attention.layer_norm_rms_epsilon": positive("norm_eps"),
    },
    names=Names(GGUF_PARTS, layers="blk"),
    tensors={
        "vocab_size": rows_of("token_embd.weight"),
        "tie_embeddings": lacks("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias"),
        "output_bias": has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_gate.bias"),
    },
    tensor=_gguf_tensor,
    numbers={"rope_factors": "rope_freqs.weight"},
)
