"""Jamba: selective state spaces, attention without positions in a few layers, experts in every other one.

AI21 2024, arXiv:2403.19887. Embedding -> N layers, each a norm and a mixer, then a norm and a gated MLP or a mixture of
experts, each beside a residual -> norm -> head. A mixer norms its dt, B and C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.models.foreign import (
    FEED_FORWARD_PARTS,
    MAX_LAYERS,
    MLP_PARTS,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    alike,
    checked_whole,
    flag,
    neutral,
    refuse,
    usual_keys,
    whole,
    width_by_heads,
)
from edgellm.models.layers import Block, Experts, GatedMLP, SelectiveMixer, Stack
from edgellm.models.registry import Architecture
from edgellm.models.shapes import ConvShape, MixtureShape, PatternShape, TransformerShape
from edgellm.models.state_spaces_files import inner_features, mixer_parts, time_step_rank

__all__ = ["ARCHITECTURE", "PRESETS", "JambaConfig", "jamba"]


@dataclass(frozen=True, kw_only=True)
class JambaConfig(PatternShape, ConvShape, MixtureShape, TransformerShape):
    """The shape of a Jamba; ``mlp_width`` is the hidden features of each expert, too.

    Args:
        inner: features of a state space, each with a state of its own.
        state_size: numbers in a state.
        rank: features that steps dt are made of.
        conv_bias: whether the convolution has a bias.
        space_bias: whether the projections in and out of a state space have one.
    """

    KINDS = ("space", "attention")
    inner: int
    state_size: int
    rank: int
    conv_bias: bool = True
    space_bias: bool = False
    norm_eps: float = 1e-6


PRESETS: Mapping[str, JambaConfig] = {
    "tiny": JambaConfig(
        vocab_size=1024, width=128, pattern=("space", "space", "attention", "space"), num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_width=352, max_context=512, inner=256, state_size=16, rank=8, experts=(1, 3), num_experts=4,
        num_chosen=2,
    ),
}  # fmt: skip


def jamba(config: JambaConfig) -> Stack:
    """The model with fresh weights."""
    return Stack(config, (_block(config, number) for number in range(len(config.pattern))))


def _block(c: JambaConfig, number: int) -> Block:
    mixer = (
        SelectiveMixer(
            c.width, c.inner, c.state_size, rank=c.rank, conv_taps=c.conv_taps, conv_bias=c.conv_bias,
            bias=c.space_bias, norms="learned", norm_eps=c.norm_eps,
        )
        if c.pattern[number] == "space"
        else c.attention()
    )  # fmt: skip
    mlp = (
        Experts(c.width, c.mlp_width, c.num_experts, c.num_chosen, normalised=False)
        if number in c.experts
        else GatedMLP(c.width, c.mlp_width)
    )
    return Block(c.width, c.norm_eps, {c.pattern[number]: mixer}, mlp)


def _every(values: Values, kind: str, period: int, offset: int, count: int) -> list[int]:
    """Every so many layers, from one on."""
    step = checked_whole(f"{kind}_period", values.get(f"{kind}_period", period))
    first = values.get(f"{kind}_offset", offset)
    if type(first) is not int or not 0 <= first < step:
        raise refuse(f"{kind}_offset", first)
    return [i for i in range(count) if i % step == first]


def _layers(name: str, values: Values, fields: Fields) -> None:
    count = checked_whole(name, values.get(name, 32), MAX_LAYERS)
    attentive = _every(values, "attn_layer", 8, 4, count)
    fields["pattern"] = tuple(JambaConfig.KINDS[i in attentive] for i in range(count))
    mixed = _every(values, "expert_layer", 2, 1, count)
    fields["experts"] = tuple(mixed) if fields["num_experts"] > 1 else ()


_PARTS = {
    **FEED_FORWARD_PARTS,
    **mixer_parts("space", "mamba"),
    **{f"space.norms.{i}": f"mamba.{part}_layernorm" for i, part in enumerate(("dt", "b", "c"))},
    "mlp.router": "feed_forward.router",
    **alike("mlp.experts.*", "feed_forward.experts.*", *MLP_PARTS),
}

_SIZES = usual_keys(
    vocab_size=65536, width=4096, num_heads=32, num_kv_heads=8, head_dim=width_by_heads, mlp_width=14336,
    max_context=262144, norm_eps=1e-6, tie_embeddings=False,
)  # fmt: skip
_UNREAD = (  # of training, of kernels, of older code, or said by other keys
    "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "use_mamba_kernels",
    "use_mambapy", "use_associative_scan", "output_router_logits", "router_aux_loss_coef", "num_logits_to_keep",
    "mamba_inner_layernorms", "calc_logits_for_entire_prompt", "num_local_experts", "n_routed_experts",
    "moe_intermediate_size",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"jamba": Variant()},
    keys={
        "num_experts": whole("num_experts", default=16),
        "num_experts_per_tok": whole("num_chosen", default=2),
        **_SIZES,
        "num_hidden_layers": _layers,
        "mamba_expand": inner_features,
        "mamba_d_state": whole("state_size", default=16),
        "mamba_dt_rank": time_step_rank,
        "mamba_d_conv": whole("conv_taps", default=4),
        "mamba_conv_bias": flag("conv_bias", default=True),
        "mamba_proj_bias": flag("space_bias", default=False),
        "hidden_act": neutral("silu", "swish"),
    },
    names=Names(_PARTS, layers="model.layers"),
    unread=_UNREAD,
)

ARCHITECTURE = Architecture(name="jamba", config=JambaConfig, build=jamba, presets=PRESETS, huggingface=HUGGING_FACE)
