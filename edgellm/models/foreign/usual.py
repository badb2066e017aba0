"""What most transformers call their keys and parts, for families to begin their tables with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edgellm.models.foreign.gguf import Shapes, lacks, rows_of
from edgellm.models.foreign.keys import (
    MAX_CONTEXT,
    MAX_LAYERS,
    Default,
    Fields,
    Key,
    choice,
    flag,
    positive,
    same_as,
    whole,
)
from edgellm.models.foreign.names import alike

__all__ = [
    "ATTENTION_PARTS",
    "FEED_FORWARD_PARTS",
    "GGUF_KEYS",
    "GGUF_PARTS",
    "GGUF_TENSORS",
    "HUGGING_FACE_PARTS",
    "MLP_PARTS",
    "as_many_heads",
    "hidden_act",
    "usual_keys",
    "width_by_heads",
]

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
MLP_PARTS = ("gate_proj", "up_proj", "down_proj")

HUGGING_FACE_PARTS: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mixer_norm": "input_layernorm",
    **alike("attention", "self_attn", *ATTENTION_PARTS),
    "mlp_norm": "post_attention_layernorm",
    **alike("mlp", "mlp", *MLP_PARTS),
}
FEED_FORWARD_PARTS: Mapping[str, str] = {  # of those that call an MLP a feed-forward layer
    **HUGGING_FACE_PARTS,
    "norm": "model.final_layernorm",
    "mlp_norm": "pre_ff_layernorm",
    **alike("mlp", "feed_forward", *MLP_PARTS),
}
GGUF_PARTS: Mapping[str, str] = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "mixer_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def hidden_act(*, default: str = "silu") -> Key:
    """The MLP's activation by transformers' name, into the field ``activation``."""
    return choice("activation", _ACTIVATIONS, default=default)


def as_many_heads(fields: Fields) -> int:
    """The default of ``num_kv_heads``: none are shared."""
    return int(fields["num_heads"])


def width_by_heads(fields: Fields) -> int:
    """The default of ``head_dim``: heads share the width."""
    return int(fields["width"] // fields["num_heads"])


_layers = partial(whole, limit=MAX_LAYERS)
_context = partial(whole, limit=MAX_CONTEXT)
_KEYS: Mapping[str, tuple[str, Callable[..., Key]]] = {  # by our field, in the order in which they are read
    "vocab_size": ("vocab_size", whole),
    "width": ("hidden_size", whole),
    "num_layers": ("num_hidden_layers", _layers),
    "num_heads": ("num_attention_heads", whole),
    "num_kv_heads": ("num_key_value_heads", whole),
    "head_dim": ("head_dim", whole),
    "mlp_width": ("intermediate_size", whole),
    "max_context": ("max_position_embeddings", _context),
    "norm_eps": ("rms_norm_eps", positive),
    "tie_embeddings": ("tie_word_embeddings", flag),
    "attention_bias": ("attention_bias", flag),
    "mlp_bias": ("mlp_bias", flag),
}


def usual_keys(**defaults: Default) -> dict[str, Key]:
    """The keys of Hugging Face that fields of ours usually have.

    Args:
        defaults: for each field that is read so, what counts where the file does not say; a function is given the
            fields that were read before it, and :data:`~edgellm.models.foreign.keys.REQUIRED` means that it must.
    """
    assert defaults.keys() <= _KEYS.keys(), f"not among the usual keys: {sorted(defaults.keys() - _KEYS.keys())}"
    return {key: read(field, default=defaults[field]) for field, (key, read) in _KEYS.items() if field in defaults}


GGUF_KEYS: Mapping[str, Key] = {
    "block_count": _layers("num_layers"),
    "context_length": _context("max_context"),
    "embedding_length": whole("width"),
    "feed_forward_length": whole("mlp_width"),
    "attention.head_count": whole("num_heads"),
    "attention.head_count_kv": whole("num_kv_heads", default=as_many_heads),
    "attention.key_length": whole("head_dim", default=width_by_heads),
    "attention.value_length": same_as("head_dim"),
    "rope.dimension_count": same_as("head_dim"),
    "rope.freq_base": positive("rope_theta", default=10000.0),
    "attention.layer_norm_rms_epsilon": positive("norm_eps"),
}
GGUF_TENSORS: Mapping[str, Callable[[Shapes], Any]] = {
    "vocab_size": rows_of("token_embd.weight"),
    "tie_embeddings": lacks("output.weight"),
}
