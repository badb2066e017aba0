"""How other people's checkpoints of RecurrentGemma are read: their keys, names and layouts."""

from __future__ import annotations

from torch import Tensor

from edgellm.models.foreign import (
    ATTENTION_PARTS,
    MAX_LAYERS,
    MLP_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    alike,
    as_many_heads,
    checked_whole,
    neutral,
    positive,
    refuse,
    rotary,
    usual_keys,
    whole,
)
from edgellm.models.layers.rotary import heads_in_order
from edgellm.models.shapes import PartlyRotaryShape

__all__ = ["HUGGING_FACE"]

_KINDS = ("recurrent", "attention")


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """The kinds of a few layers, again and again."""
    count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", 26), MAX_LAYERS)
    kinds = values.get(name) or ("recurrent", "recurrent", "attention")
    if other := [kind for kind in kinds if kind not in _KINDS]:
        raise refuse(name, other[0])
    fields["pattern"] = tuple(kinds[i % len(kinds)] for i in range(count))
    fields["head_dim"] = fields["width"] // fields["num_heads"]


def _mlp_width(name: str, values: Values, fields: Fields) -> None:
    fields["mlp_width"] = checked_whole(name, values.get(name, 7680)) // 2


def _tensor(config: PartlyRotaryShape, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Norms by 1 + w, and features of a head in the order that attention turns."""
    if name == "norm.weight" or name.endswith("_norm.weight"):
        return 1 + tensor.float()
    if ".q_proj." in name or ".k_proj." in name:
        return heads_in_order(tensor, config.head_dim, config.rotated)
    return tensor


_SIZES = usual_keys(
    vocab_size=256000, width=2560, num_heads=10, num_kv_heads=as_many_heads,
    max_context=8192,  # of its training
    norm_eps=1e-6, tie_embeddings=True, attention_bias=False,
)  # fmt: skip
_UNREAD = (
    "num_hidden_layers", "head_dim",  # which follows from the heads
    "w_init_variance_scale", "final_w_init_variance_scale", "_block_types", "layers_block_type",
    "embeddings_scale_by_sqrt_dim",
)  # fmt: skip
_PARTS = {
    "embedding": "model.embed_tokens",
    "norm": "model.final_norm",
    "head": "lm_head",
    "mixer_norm": "temporal_pre_norm",
    **alike("mixer", "temporal_block", *ATTENTION_PARTS),
    "mixer.gate_proj": "temporal_block.linear_y",
    "mixer.in_proj": "temporal_block.linear_x",
    "mixer.out_proj": "temporal_block.linear_out",
    "mixer.conv": "temporal_block.conv_1d",
    "mixer.fading": "temporal_block.rg_lru.recurrent_param",
    **{f"mixer.input_{x}": f"temporal_block.rg_lru.input_gate_{x}" for x in ("weight", "bias")},
    **{f"mixer.fading_{x}": f"temporal_block.rg_lru.recurrent_gate_{x}" for x in ("weight", "bias")},
    "mlp_norm": "channel_pre_norm",
    **alike("mlp", "mlp_block", *MLP_PARTS),
}

HUGGING_FACE = HuggingFace(
    types={"recurrent_gemma": Variant()},
    keys={
        **_SIZES,
        "block_types": _pattern,
        "lru_width": whole("recurrent_width", default=lambda fields: fields["width"]),
        "attention_window_size": whole("window", default=2048),
        "intermediate_size": _mlp_width,
        "conv1d_width": whole("conv_taps", default=4),
        "logits_soft_cap": positive("logit_cap", default=30.0),
        **rotary(share=0.5),
        "hidden_activation": neutral("gelu_pytorch_tanh"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
    tensor=_tensor,
)
