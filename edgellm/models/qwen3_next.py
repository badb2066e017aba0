"""Qwen3-Next and Qwen3.5: memories under the gated delta rule, gated attention in a few of the layers.

Qwen team 2025; the mixer: Yang et al. 2024, arXiv:2412.06464. Embedding -> N layers, each a norm and a mixer, then a
norm and a gated MLP or a mixture of experts, each beside a residual -> norm -> head. A quarter of each head turns with
the position. Norms multiply by 1 + w in the files, and by w here; what the files interleave lies apart here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.layers import Block, Experts, GatedDeltaMixer, GatedMLP, Stack
from edgellm.models.qwen3_next_files import HUGGING_FACE
from edgellm.models.registry import Architecture
from edgellm.models.shapes import ConvShape, MixtureShape, PartlyRotaryShape, PatternShape

__all__ = ["ARCHITECTURE", "PRESETS", "Qwen3NextConfig", "qwen3_next"]


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(PatternShape, ConvShape, MixtureShape, PartlyRotaryShape):
    """The shape of a Qwen3-Next.

    Args:
        delta_heads: heads of a memory.
        delta_groups: queries and keys of a memory; divides ``delta_heads``.
        delta_key_dim: features of such a query or key.
        delta_value_dim: features of a value.
        expert_width: hidden features of an expert.
        shared_width: hidden features of the expert that every token has.
        normalised: whether the weights of the chosen experts sum to 1.
        packed: whether the projections of a memory are packed in two.
        attention_bias: whether the projections of attention have a bias.
    """

    KINDS = ("delta", "attention")
    delta_heads: int
    delta_groups: int
    delta_key_dim: int
    delta_value_dim: int
    expert_width: int = 1
    shared_width: int = 1
    normalised: bool = True
    packed: bool = True
    attention_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta_heads % self.delta_groups:
            raise ConfigError(f"delta_heads {self.delta_heads} must be a multiple of delta_groups {self.delta_groups}")


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
    return Stack(c, (_block(c, number) for number in range(len(c.pattern))), rotary=c.rotary())


def _block(c: Qwen3NextConfig, number: int) -> Block:
    mixer = (
        GatedDeltaMixer(
            c.width, c.delta_heads, c.delta_groups, c.delta_key_dim, c.delta_value_dim, conv_taps=c.conv_taps,
            packed=c.packed, norm_eps=c.norm_eps,
        )
        if c.pattern[number] == "delta"
        else c.attention(
            bias=c.attention_bias, output_bias=c.attention_bias, qk_norm=True, norm_eps=c.norm_eps, gated=True
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


ARCHITECTURE = Architecture(
    name="qwen3_next", config=Qwen3NextConfig, build=qwen3_next, presets=PRESETS, huggingface=HUGGING_FACE
)
