"""How other people's checkpoints of Granite 4 are read: keys and names, and a scale that goes into the weights."""

from __future__ import annotations

from torch import Tensor

from edgellm.models.foreign import (
    HUGGING_FACE_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    as_many_heads,
    checked_positive,
    checked_whole,
    choice,
    hidden_act,
    inverse,
    positive,
    rotary,
    usual_keys,
    whole,
    width_by_heads,
)
from edgellm.models.state_spaces_files import mixer_keys, mixer_parts, pattern_key

__all__ = ["HUGGING_FACE"]

_KINDS = {"linear_attention": "space", "full_attention": "attention", "mamba": "space", "attention": "attention"}


def _num_experts(name: str, values: Values, fields: Fields) -> None:
    given = values.get(name, 8)
    fields["num_experts"] = None if given == 0 else checked_whole(name, given)


def _positive(name: str, values: Values, _fields: Fields) -> None:
    checked_positive(name, values.get(name, 1.0))


def _with_residual(_config: object, values: Values, name: str, tensor: Tensor) -> Tensor:
    """What is added to a residual, times what the file multiplies it by."""
    scale = float(values.get("residual_multiplier", 1.0))
    ends = name.rpartition(".")[0].endswith((".o_proj", ".out_proj"))
    return tensor * scale if ends and scale != 1 else tensor


_PARTS = {
    **HUGGING_FACE_PARTS,
    **mixer_parts("space", "mamba"),
    "mlp.in_proj": "shared_mlp.input_linear",
    "mlp.out_proj": "shared_mlp.output_linear",
    "mlp.router": "block_sparse_moe.router.layer",
    "mlp.shared.in_proj": "shared_mlp.input_linear",
    "mlp.shared.out_proj": "shared_mlp.output_linear",
    "mlp.experts.*.in_proj": "block_sparse_moe.input_linear.*",
    "mlp.experts.*.out_proj": "block_sparse_moe.output_linear.*",
}

_SIZES = usual_keys(
    vocab_size=32000, width=4096, num_heads=32, num_kv_heads=as_many_heads, head_dim=width_by_heads,
    mlp_width=11008, max_context=2048, norm_eps=1e-6, tie_embeddings=False, attention_bias=False,
)  # fmt: skip
_UNREAD = (  # of training, of kernels, of older code, or said by other keys
    "num_hidden_layers", "output_router_logits", "router_aux_loss_coef", "init_method", "normalization_function",
    "num_experts", "n_routed_experts", "moe_intermediate_size",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"granitemoehybrid": Variant()},
    keys={
        **_SIZES,
        "layer_types": pattern_key(_KINDS),
        "shared_intermediate_size": whole("shared_width", default=1024),
        "num_local_experts": _num_experts,
        "num_experts_per_tok": whole("num_chosen", default=2),
        **mixer_keys(),
        **rotary(),
        "position_embedding_type": choice("rotates", {"rope": True, "nope": False}, default=False),
        "hidden_act": hidden_act(),
        "attention_multiplier": positive("score_scale", default=1.0),
        "embedding_multiplier": positive("embedding_scale", default=1.0),
        "residual_multiplier": _positive,
        "logits_scaling": inverse("logit_scale"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
    tensor=_with_residual,
    stacked=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
