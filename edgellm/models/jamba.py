"""Jamba: selective state spaces, attention without positions in a few layers, experts in every other one.

AI21 2024, arXiv:2403.19887. Embedding -> N layers, each a norm and a mixer, then a norm and a gated MLP or a mixture of
experts, each beside a residual -> norm -> head. A mixer norms its dt, B and C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.foreign import (
    HUGGING_FACE_PARTS,
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    Fields,
    HuggingFace,
    Names,
    Values,
    Variant,
    flag,
    neutral,
    positive,
    refuse,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, Experts, GatedMLP, SelectiveMixer, SelfAttention, Stack
from edgellm.models.mamba import time_step_rank
from edgellm.models.registry import Architecture

__all__ = ["ARCHITECTURE", "PRESETS", "JambaConfig", "jamba"]

MIXERS = ("space", "attention")


@dataclass(frozen=True, kw_only=True)
class JambaConfig(Shape):
    """The shape of a Jamba.

    Args:
        vocab_size: tokens.
        width: features between layers.
        pattern: one mixer a layer, first to last; each ``space`` or ``attention``.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        mlp_width: hidden features of the gated MLP, and of each expert.
        max_context: the most tokens that a row may hold.
        inner: features of a state space, each with a state of its own.
        state_size: numbers in a state.
        rank: features that steps dt are made of.
        experts: the layers with a mixture of experts, by their numbers; empty for none.
        num_experts: experts of a mixture.
        num_chosen: how many of them a token has.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        space_bias: whether the projections in and out of a state space have one.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    pattern: Sequence[str]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_context: int
    inner: int
    state_size: int
    rank: int
    experts: Sequence[int] = ()
    num_experts: int = 1
    num_chosen: int = 1
    conv_taps: int = 4
    conv_bias: bool = True
    space_bias: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if not self.pattern or any(mixer not in MIXERS for mixer in self.pattern) or self.conv_taps < 2:
            raise ConfigError(
                f"pattern is {self.pattern}, conv_taps {self.conv_taps}; a pattern has {' or '.join(MIXERS)} for each "
                "layer, and a convolution at least 2 taps"
            )
        if self.num_chosen > self.num_experts:
            raise ConfigError(f"num_chosen is {self.num_chosen}, of num_experts {self.num_experts}")


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
        else SelfAttention(c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=False)
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
    fields["pattern"] = tuple(MIXERS[i in attentive] for i in range(count))
    mixed = _every(values, "expert_layer", 2, 1, count)
    fields["experts"] = tuple(mixed) if fields["num_experts"] > 1 else ()


def _inner(name: str, values: Values, fields: Fields) -> None:
    fields["inner"] = fields["width"] * checked_whole(name, values.get(name, 2))


_UNREAD = (  # of training, of kernels and of older code
    "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "use_mamba_kernels",
    "use_mambapy", "use_associative_scan", "output_router_logits", "router_aux_loss_coef", "num_logits_to_keep",
    "mamba_inner_layernorms", "calc_logits_for_entire_prompt", "num_local_experts", "n_routed_experts",
    "moe_intermediate_size",
)  # fmt: skip

HUGGING_FACE = HuggingFace(
    types={"jamba": Variant()},
    keys={
        "vocab_size": whole("vocab_size", default=65536),
        "hidden_size": whole("width", default=4096),
        "num_experts": whole("num_experts", default=16),
        "num_experts_per_tok": whole("num_chosen", default=2),
        "num_hidden_layers": _layers,
        "num_attention_heads": whole("num_heads", default=32),
        "num_key_value_heads": whole("num_kv_heads", default=8),
        "head_dim": whole("head_dim", default=lambda fields: fields["width"] // fields["num_heads"]),
        "intermediate_size": whole("mlp_width", default=14336),
        "max_position_embeddings": whole("max_context", default=262144, limit=MAX_CONTEXT),
        "mamba_expand": _inner,
        "mamba_d_state": whole("state_size", default=16),
        "mamba_dt_rank": time_step_rank,
        "mamba_d_conv": whole("conv_taps", default=4),
        "mamba_conv_bias": flag("conv_bias", default=True),
        "mamba_proj_bias": flag("space_bias", default=False),
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": neutral("silu", "swish"),
        **dict.fromkeys(_UNREAD, METADATA),
    },
    names=Names(
        {
            **HUGGING_FACE_PARTS,
            "norm": "model.final_layernorm",
            "mixer_norm": "input_layernorm",
            **{f"space.{part}": f"mamba.{part}" for part in ("in_proj", "x_proj", "dt_proj", "out_proj")},
            **{f"space.norms.{i}": f"mamba.{part}_layernorm" for i, part in enumerate(("dt", "b", "c"))},
            "space.conv": "mamba.conv1d",
            "space.a_log": "mamba.A_log",
            "space.d": "mamba.D",
            "mlp_norm": "pre_ff_layernorm",
            "mlp.router": "feed_forward.router",
            **{f"mlp.{part}": f"feed_forward.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
            **{
                f"mlp.experts.*.{part}": f"feed_forward.experts.*.{part}"
                for part in ("gate_proj", "up_proj", "down_proj")
            },
        },
        layers="model.layers",
    ),
)

ARCHITECTURE = Architecture(name="jamba", config=JambaConfig, build=jamba, presets=PRESETS, huggingface=HUGGING_FACE)
