"""How other people's checkpoints of the Llama-style decoder are read: their types, keys and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edgellm.models.foreign import (
    GGUF,
    GGUF_KEYS,
    GGUF_PARTS,
    GGUF_TENSORS,
    HUGGING_FACE_PARTS,
    METADATA,
    REQUIRED,
    Fields,
    HuggingFace,
    Key,
    Names,
    Values,
    Variant,
    as_many_heads,
    checked_whole,
    flag,
    full_attention,
    has,
    hidden_act,
    inverse,
    neutral,
    no_window,
    positive,
    refuse,
    rotary,
    usual_keys,
    whole,
    width_by_heads,
    windows,
)
from edgellm.models.layers.rotary import heads_in_order
from edgellm.models.shapes import RotaryShape

__all__ = ["GGUF_FILES", "HUGGING_FACE"]


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


def _in_order(config: RotaryShape, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Features of a head in the order that attention turns."""
    if config.turning == config.head_dim or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    return heads_in_order(tensor, config.head_dim, config.turning)


def _packed(config: RotaryShape) -> Mapping[str, Mapping[str, int]]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
        "mlp.gate_up_proj": {"mlp.gate_proj": config.mlp_width, "mlp.up_proj": config.mlp_width},
    }


_SCALED: Mapping[str, Key] = {
    "num_key_value_heads": whole("num_kv_heads", default=as_many_heads),
    "attention_bias": _every_bias,
    "mlp_bias": flag("mlp_bias", default=False),
    "attention_multiplier": positive("attention_scale", default=1.0),
    "embedding_multiplier": positive("embedding_scale", default=1.0),
    "residual_multiplier": positive("residual_scale", default=1.0),
    "logits_scaling": inverse("logit_scale"),
}
_PACKED: Mapping[str, Key] = {
    "num_key_value_heads": whole("num_kv_heads", default=as_many_heads),
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

_SIZES = usual_keys(
    vocab_size=REQUIRED, width=REQUIRED, num_layers=REQUIRED, num_heads=REQUIRED, num_kv_heads=REQUIRED,
    head_dim=width_by_heads, mlp_width=REQUIRED, max_context=REQUIRED, norm_eps=1e-6, tie_embeddings=False,
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={
        "llama": Variant(
            keys={
                "num_key_value_heads": whole("num_kv_heads", default=as_many_heads),
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
        **_SIZES,
        "sliding_window": no_window(),
        "layer_types": full_attention,
        **rotary(),
        "hidden_act": hidden_act(),
    },
    names=Names(HUGGING_FACE_PARTS, layers="model.layers"),
    tensor=_in_order,
    packed=_packed,
)


def _gguf_tensor(config: RotaryShape, metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k from neighbouring pairs, as llama.cpp rotates this one architecture, to the two halves."""
    if metadata["general.architecture"] != "llama" or (".q_proj." not in name and ".k_proj." not in name):
        return tensor
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)


GGUF_FILES = GGUF(
    types={"llama": Variant(), "qwen2": Variant(), "qwen3": Variant(fields={"qk_norm": True})},
    keys=GGUF_KEYS,
    names=Names(GGUF_PARTS, layers="blk"),
    tensors={
        **GGUF_TENSORS,
        "attention_bias": has("blk.0.attn_q.bias"),
        "output_bias": has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_gate.bias"),
    },
    tensor=_gguf_tensor,
    numbers={"rope_factors": "rope_freqs.weight"},
)
