"""Qwen3-Next and Qwen3.5: memories under the gated delta rule, gated attention in a few of the layers.

Qwen team 2025; the mixer: Yang et al. 2024, arXiv:2412.06464. Embedding -> N layers, each a norm and a mixer, then a
norm and a gated MLP or a mixture of experts, each beside a residual -> norm -> head. A quarter of each head turns with
the position. Norms multiply by 1 + w in the files, and by w here; what the files interleave lies apart here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.models.config import Shape, check_heads
from edgellm.models.foreign import (
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
    neutral,
    positive,
    refuse,
    rotary,
    whole,
)
from edgellm.models.foreign.keys import checked_whole
from edgellm.models.layers import Block, Experts, GatedDeltaMixer, GatedMLP, RotaryTable, SelfAttention, Stack
from edgellm.models.layers.rotary import order_of_part
from edgellm.models.registry import Architecture

__all__ = ["ARCHITECTURE", "PRESETS", "Qwen3NextConfig", "qwen3_next"]

MIXERS = {"linear_attention": "delta", "full_attention": "attention"}  # transformers' names and ours


@dataclass(frozen=True)
class Qwen3NextConfig(Shape):
    """The shape of a Qwen3-Next.

    Args:
        vocab_size: tokens.
        width: features between layers.
        pattern: one mixer a layer, first to last; each ``delta`` or ``attention``.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        rotated: how many of them turn with the position.
        delta_heads: heads of a memory.
        delta_groups: queries and keys of a memory; divides ``delta_heads``.
        delta_key_dim: features of such a query or key.
        delta_value_dim: features of a value.
        mlp_width: hidden features of the gated MLP.
        max_context: the most tokens that a row may hold.
        experts: the layers with a mixture of experts, by their numbers; empty for none.
        num_experts: experts of a mixture.
        num_chosen: how many of them a token has.
        expert_width: hidden features of an expert.
        shared_width: hidden features of the expert that every token has.
        normalised: whether the weights of the chosen experts sum to 1.
        packed: whether the projections of a memory are packed in two.
        conv_taps: tokens that a convolution sees.
        attention_bias: whether the projections of attention have a bias.
        rope_theta: base of the rotary frequencies.
        rope_factors: (rotated / 2,), each frequency is divided by its own; empty: by none.
        rope_amplitude: factor on the cosines and sines of the rotation.
        norm_eps: added to the mean square in the norms.
        tie_embeddings: whether the vocabulary projection is the embedding.
    """

    vocab_size: int
    width: int
    pattern: Sequence[str]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int
    delta_heads: int
    delta_groups: int
    delta_key_dim: int
    delta_value_dim: int
    mlp_width: int
    max_context: int
    experts: Sequence[int] = ()
    num_experts: int = 1
    num_chosen: int = 1
    expert_width: int = 1
    shared_width: int = 1
    normalised: bool = True
    packed: bool = True
    conv_taps: int = 4
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rope_factors: Sequence[float] = ()
    rope_amplitude: float = 1.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or any(mixer not in MIXERS.values() for mixer in self.pattern) or self.conv_taps < 2:
            raise ConfigError(
                f"pattern is {self.pattern}, conv_taps {self.conv_taps}; a pattern has delta or attention for each "
                "layer, and a convolution at least 2 taps"
            )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.delta_heads % self.delta_groups or self.rotated % 2 or self.rotated > self.head_dim:
            raise ConfigError(
                f"delta_heads {self.delta_heads} must be a multiple of delta_groups {self.delta_groups}, and rotated "
                f"{self.rotated} even and at most head_dim {self.head_dim}"
            )
        if self.num_chosen > self.num_experts:
            raise ConfigError(f"num_chosen is {self.num_chosen}, of num_experts {self.num_experts}")


PRESETS: Mapping[str, Qwen3NextConfig] = {
    "tiny": Qwen3NextConfig(
        vocab_size=1024, width=128, pattern=("delta", "delta", "delta", "attention"), num_heads=4, num_kv_heads=2,
        head_dim=32, rotated=8, delta_heads=4, delta_groups=2, delta_key_dim=32, delta_value_dim=32, mlp_width=352,
        max_context=512, tie_embeddings=True,
    ),
}  # fmt: skip


def qwen3_next(config: Qwen3NextConfig) -> Stack:
    """The model with fresh weights."""
    c = config
    table = RotaryTable(
        c.rotated, c.max_context, c.rope_theta, factors=c.rope_factors, amplitude=c.rope_amplitude,
        still=c.head_dim - c.rotated,
    )  # fmt: skip
    return Stack(c, (_block(c, number) for number in range(len(c.pattern))), rotary=table)


def _block(c: Qwen3NextConfig, number: int) -> Block:
    mixer = (
        GatedDeltaMixer(
            c.width, c.delta_heads, c.delta_groups, c.delta_key_dim, c.delta_value_dim, conv_taps=c.conv_taps,
            packed=c.packed, norm_eps=c.norm_eps,
        )
        if c.pattern[number] == "delta"
        else SelfAttention(
            c.width, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, output_bias=c.attention_bias,
            qk_norm=True, norm_eps=c.norm_eps, gated=True,
        )
    )  # fmt: skip
    mlp = (
        Experts(
            c.width, c.expert_width, c.num_experts, c.num_chosen, normalised=c.normalised, shared_hidden=c.shared_width
        )
        if number in c.experts
        else GatedMLP(c.width, c.mlp_width)
    )
    return Block(c.width, c.norm_eps, {"mixer": mixer}, mlp)


def _pattern(layers: int) -> Key:
    """Each layer's mixer; where the file names none, every fourth is attention.

    Args:
        layers: how many there are where the file does not say.
    """

    def take(name: str, values: Values, fields: Fields) -> None:
        count = checked_whole("num_hidden_layers", values.get("num_hidden_layers", layers), MAX_LAYERS)
        every = checked_whole("full_attention_interval", values.get("full_attention_interval", 4))
        kinds = values.get(name) or [[*MIXERS][(i + 1) % every == 0] for i in range(count)]
        if len(kinds) != count or (other := [kind for kind in kinds if kind not in MIXERS]):
            raise refuse(name, other[0] if len(kinds) == count else kinds)
        fields["pattern"] = tuple(MIXERS[kind] for kind in kinds)

    return take


def _sparse(name: str, values: Values, fields: Fields) -> None:
    """Which layers have experts."""
    step, plain = checked_whole(name, values.get(name, 1)), values.get("mlp_only_layers") or ()
    fields["experts"] = tuple(i for i in range(len(fields["pattern"])) if i not in plain and (i + 1) % step == 0)


def _tensor(config: Qwen3NextConfig, _values: Values, name: str, tensor: Tensor) -> Tensor:
    """Norms by 1 + w, features of a head in the order that attention turns, and what was interleaved apart."""
    c, part = config, name.rpartition(".mixer.")[2].rpartition(".")[0]
    attends = ".mixer." in name and c.pattern[int(name.split(".")[1])] == "attention"
    order = order_of_part(c.head_dim, c.rotated)
    if attends and part == "q_proj":
        heads = tensor.reshape(c.num_heads, 2, c.head_dim, *tensor.shape[1:])  # a query and a gate for each
        return torch.cat([heads[:, 0, order].flatten(0, 1), heads[:, 1].flatten(0, 1)])
    if attends and part == "k_proj":
        return tensor.reshape(c.num_kv_heads, c.head_dim, *tensor.shape[1:])[:, order].flatten(0, 1)
    if attends and part in ("q_norm", "k_norm"):
        return 1 + tensor[order].float()
    if name == "norm.weight" or name.endswith("_norm.weight"):
        return 1 + tensor.float()
    if part in ("qkvz_proj", "gates_proj"):
        shared = c.delta_heads // c.delta_groups
        keys, values = c.delta_key_dim, shared * c.delta_value_dim
        groups = tensor.reshape(c.delta_groups, -1, tensor.shape[1])
        sizes = [keys, keys, values, values] if part == "qkvz_proj" else [shared, shared]
        return torch.cat([x.flatten(0, 1) for x in torch.split(groups, sizes, dim=1)])
    return tensor


def _experts(count: int, chosen: int, **more: Key) -> dict[str, Key]:
    """The keys of mixtures of experts.

    Args:
        count: experts where the file does not say.
        chosen: of them, a token's.
        more: which layers have a mixture, and how its experts are weighted.
    """
    return {
        "num_experts": whole("num_experts", default=count),
        "num_experts_per_tok": whole("num_chosen", default=chosen),
        "moe_intermediate_size": whole("expert_width", default=512),
        "shared_expert_intermediate_size": whole("shared_width", default=512),
        **dict.fromkeys(("router_aux_loss_coef", "output_router_logits"), METADATA),  # of training
        **dict.fromkeys(("num_local_experts", "n_routed_experts"), METADATA),  # the same number again
        **more,
    }


HUGGING_FACE = HuggingFace(
    types={
        "qwen3_next": Variant(
            keys=_experts(
                512,
                10,
                decoder_sparse_step=_sparse,
                mlp_only_layers=METADATA,
                norm_topk_prob=flag("normalised", default=True),
            )
        ),
        "qwen3_5_moe_text": Variant(
            fields={"packed": False},
            keys={
                "vocab_size": whole("vocab_size", default=248320),
                "layer_types": _pattern(40),
                **_experts(256, 8),
                "decoder_sparse_step": _sparse,  # every layer, for the file does not say
                "intermediate_size": whole("mlp_width", default=1),  # of no layer
            },
        ),
        "qwen3_5_text": Variant(
            fields={"packed": False},
            keys={
                "vocab_size": whole("vocab_size", default=248320),
                "hidden_size": whole("width", default=4096),
                "layer_types": _pattern(32),
                "num_key_value_heads": whole("num_kv_heads", default=4),
                "intermediate_size": whole("mlp_width", default=12288),
            },
        ),
    },
    keys={
        "vocab_size": whole("vocab_size", default=151936),
        "hidden_size": whole("width", default=2048),
        "layer_types": _pattern(48),
        "num_attention_heads": whole("num_heads", default=16),
        "num_key_value_heads": whole("num_kv_heads", default=2),
        "head_dim": whole("head_dim", default=256),
        "linear_num_value_heads": whole("delta_heads", default=32),
        "linear_num_key_heads": whole("delta_groups", default=16),
        "linear_key_head_dim": whole("delta_key_dim", default=128),
        "linear_value_head_dim": whole("delta_value_dim", default=128),
        "linear_conv_kernel_dim": whole("conv_taps", default=4),
        "intermediate_size": whole("mlp_width", default=5632),
        "max_position_embeddings": whole("max_context", default=32768, limit=MAX_CONTEXT),
        "attention_bias": flag("attention_bias", default=False),
        **rotary(share=0.25, without_effect=("mrope_section", "mrope_interleaved")),  # of pictures' positions
        "rms_norm_eps": positive("norm_eps", default=1e-6),
        "tie_word_embeddings": flag("tie_embeddings", default=False),
        "hidden_act": neutral("silu", "swish"),
        "num_hidden_layers": METADATA,
        "full_attention_interval": METADATA,
    },
    names=Names(
        {
            **{ours: theirs for ours, theirs in HUGGING_FACE_PARTS.items() if not ours.startswith("attention")},
            "mixer_norm": "input_layernorm",
            **{f"mixer.{part}": f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")},
            **{f"mixer.{part}": f"self_attn.{part}" for part in ("q_norm", "k_norm")},
            **{f"mixer.{part}": f"linear_attn.{part}" for part in ("norm", "out_proj")},
            **{f"mixer.{part}_proj": f"linear_attn.in_proj_{part}" for part in ("qkvz", "qkv", "z")},
            "mixer.gates_proj": "linear_attn.in_proj_ba",
            "mixer.beta_proj": "linear_attn.in_proj_b",
            "mixer.decay_proj": "linear_attn.in_proj_a",
            "mixer.conv": "linear_attn.conv1d",
            "mixer.dt_offset": "linear_attn.dt_bias",
            "mixer.a_log": "linear_attn.A_log",
            "mlp.router": "mlp.gate",
            "mlp.shared_gate": "mlp.shared_expert_gate",
            **{f"mlp.experts.*.{part}": f"mlp.experts.*.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
            **{f"mlp.shared.{part}": f"mlp.shared_expert.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
        },
        layers="model.layers",
    ),
    tensor=_tensor,
)

ARCHITECTURE = Architecture(
    name="qwen3_next", config=Qwen3NextConfig, build=qwen3_next, presets=PRESETS, huggingface=HUGGING_FACE
)
