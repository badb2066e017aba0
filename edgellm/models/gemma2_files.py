"""How other people's checkpoints of Gemma 2 are read: their keys, names and layouts."""

from __future__ import annotations

from torch import Tensor

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
    Key,
    Names,
    Values,
    Variant,
    checked_kinds,
    checked_positive,
    checked_whole,
    neutral,
    positive,
    rotary,
    usual_keys,
    whole,
)

__all__ = ["GGUF_FILES", "HUGGING_FACE"]

_LARGEST = 46  # layers
_KINDS = ("sliding_attention", "full_attention")


def _windows(name: str, values: Values, fields: Fields) -> None:
    """Each layer's window; where the file names no kinds, every other layer has one, from the first."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 26), MAX_LAYERS)
    window = values.get("sliding_window", 4096)
    window = 0 if window is None else checked_whole("sliding_window", window)
    kinds = checked_kinds(name, values.get(name) or [_KINDS[i % 2] for i in range(count)], _KINDS, count)
    fields["windows"] = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _cap(into: str, default: float) -> Key:
    """A soft cap; null means none."""

    def take(name: str, values: Values, fields: Fields) -> None:
        value = values.get(name, default)
        fields[into] = 0.0 if value is None else checked_positive(name, value)

    return take


_SIZES = usual_keys(
    vocab_size=256000, width=2304, num_heads=8, num_kv_heads=4, head_dim=256, mlp_width=9216, max_context=8192,
    norm_eps=1e-6, tie_embeddings=True,
)  # fmt: skip
_PARTS = {
    **HUGGING_FACE_PARTS,
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

HUGGING_FACE = HuggingFace(
    types={"gemma2": Variant()},
    keys={
        **_SIZES,
        "layer_types": _windows,
        "query_pre_attn_scalar": positive("score_divisor", default=256.0),
        "attn_logit_softcapping": _cap("score_cap", 50.0),
        "final_logit_softcapping": _cap("logit_cap", 30.0),
        **rotary(),
        "hidden_activation": neutral("gelu_pytorch_tanh", None),
        "use_bidirectional_attention": neutral(False, None),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=("num_hidden_layers", "sliding_window", "hidden_act", "cache_implementation"),  # or read with others
)


def _gguf_windows(name: str, values: Values, fields: Fields) -> None:
    """A window in every other layer, from the first."""
    count = checked_whole(name, values.get(name), MAX_LAYERS)
    window = checked_whole("attention.sliding_window", values.get("attention.sliding_window", 4096))
    fields["windows"] = tuple((window, 0)[i % 2] for i in range(count))


def _gguf_divisor(name: str, values: Values, fields: Fields) -> None:
    """What scores are divided by has no key: it is the head's features, but for the largest of these models."""
    whole("head_dim")(name, values, fields)
    largest = len(fields["windows"]) == _LARGEST
    fields["score_divisor"] = float(fields["width"] // fields["num_heads"] if largest else fields["head_dim"])


def _gguf_tensor(_config: object, _metadata: Values, name: str, tensor: Tensor) -> Tensor:
    """The file has 1 + w of each norm."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


GGUF_FILES = GGUF(
    types={"gemma2": Variant()},
    keys={
        **GGUF_KEYS,
        "block_count": _gguf_windows,
        "attention.key_length": _gguf_divisor,
        "attention.sliding_window": METADATA,  # read with the layers
        "attn_logit_softcapping": positive("score_cap", default=0.0),
        "final_logit_softcapping": positive("logit_cap", default=0.0),
    },
    names=Names(
        {**GGUF_PARTS, "attention_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}, layers="blk"
    ),
    tensors=GGUF_TENSORS,
    tensor=_gguf_tensor,
)
