"""How other people's checkpoints of Nemotron-H are read: their keys and names."""

from __future__ import annotations

from edgellm.models.foreign import (
    ATTENTION_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    alike,
    checked_whole,
    choice,
    flag,
    neutral,
    positive,
    refuse,
    usual_keys,
    whole,
)
from edgellm.models.state_spaces_files import BACKBONE_PARTS, mixer_parts, pattern_key

__all__ = ["HUGGING_FACE"]

_KINDS = {
    "linear_attention": "space", "full_attention": "attention", "mlp": "mlp", "moe": "experts", "mamba": "space",
    "attention": "attention", "M": "space", "*": "attention", "-": "mlp", "E": "experts",
}  # fmt: skip


def _pattern(name: str, values: Values, fields: Fields) -> None:
    """What each layer is: a list, or in older files a letter each."""
    older = values.get("hybrid_override_pattern")
    if older is not None and not isinstance(older, str):
        raise refuse("hybrid_override_pattern", older)
    named = values.get(name)
    if not named:
        name, named = (name, [*_KINDS][:4]) if older is None else ("hybrid_override_pattern", list(older))
    pattern_key(_KINDS)(name, {name: named}, fields)


def _latent(name: str, values: Values, fields: Fields) -> None:
    fields["latent_width"] = None if values.get(name) is None else checked_whole(name, values[name])


_SIZES = usual_keys(
    vocab_size=131072, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=21504, max_context=4096,
    mlp_bias=False,
)  # fmt: skip
_UNREAD = (  # of training, of kernels and of older code
    "hybrid_override_pattern", "num_hidden_layers", "expand", "mamba_proj_bias", "time_step_max", "time_step_floor",
    "chunk_size", "use_mamba_kernels", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "n_shared_experts",
    "mtp_layers_block_type", "output_router_logits", "residual_in_fp32", "rescale_prenorm_residual",
    "num_logits_to_keep", "num_local_experts", "num_experts",
    "time_step_limit",  # transformers bounds by time_step_min, and reads no limit
    "tie_word_embeddings",  # transformers ties nothing here, whatever it says
)  # fmt: skip
_PARTS = {
    **BACKBONE_PARTS,
    "mlp_norm": "norm",
    **mixer_parts("space", "mixer"),
    **alike("attention", "mixer", *ATTENTION_PARTS),
    "mlp.fc1": "mixer.up_proj",
    "mlp.fc2": "mixer.down_proj",
    "mlp.experts.*.fc1": "mixer.experts.*.up_proj",
    "mlp.experts.*.fc2": "mixer.experts.*.down_proj",
    "mlp.shared.fc1": "mixer.shared_experts.up_proj",
    "mlp.shared.fc2": "mixer.shared_experts.down_proj",
    "mlp.router": "mixer.gate",
    "mlp.offsets": "mixer.gate.e_score_correction_bias",
    "mlp.latent_in": "mixer.fc1_latent_proj",
    "mlp.latent_out": "mixer.fc2_latent_proj",
}

HUGGING_FACE = HuggingFace(
    types={"nemotron_h": Variant()},
    keys={
        **_SIZES,
        "layers_block_type": _pattern,
        "mamba_num_heads": whole("space_heads", default=128),
        "mamba_head_dim": whole("space_head_dim", default=64),
        "ssm_state_size": whole("state_size", default=128),
        "n_groups": whole("num_groups", default=8),
        "conv_kernel": whole("conv_taps", default=4),
        "use_conv_bias": flag("conv_bias", default=True),
        "use_bias": flag("space_bias", default=False),
        "time_step_min": positive("least_step", default=0.001),
        "mlp_hidden_act": choice("activation", {"relu2": "relu2", "relu": "relu", "silu": "silu"}, default="relu2"),
        "mamba_hidden_act": neutral("silu", "swish"),
        "layer_norm_epsilon": positive("norm_eps", default=1e-5),
        "n_routed_experts": whole("num_experts", default=8),
        "num_experts_per_tok": whole("num_chosen", default=2),
        "moe_intermediate_size": whole("expert_width", default=7688),
        "moe_shared_expert_intermediate_size": whole("shared_width", default=7688),
        "moe_latent_size": _latent,
        "n_group": whole("num_sets", default=1),
        "topk_group": whole("sets_chosen", default=1),
        "norm_topk_prob": flag("normalised", default=True),
        "routed_scaling_factor": positive("share_scale", default=1.0),
        "num_nextn_predict_layers": neutral(0, None),
    },
    names=Names(_PARTS, layers="backbone.layers"),
    unread=_UNREAD,
)
