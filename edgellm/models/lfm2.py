"""LFM2: gated short convolutions, and attention with norms of queries and keys in a few of the layers.

Liquid AI 2025, arXiv:2511.23404. Embedding -> N layers, each a norm and a mixer beside a residual, then a norm and a
gated MLP beside a residual -> norm -> head. A convolution mixes y = C * conv(B * x), with B, C and x projected from its
input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from edgellm.models.layers import Block, CausalConv, GatedMLP, Stack
from edgellm.models.lfm2_files import GGUF_FILES, HUGGING_FACE
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.shapes import ConvShape, PatternShape, RotaryShape
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "LFM2Config", "lfm2"]


@dataclass(frozen=True, kw_only=True)
class LFM2Config(PatternShape, ConvShape, RotaryShape):
    """The shape of an LFM2.

    Args:
        conv_bias: whether convolutions and their projections have a bias.
    """

    KINDS = ("conv", "attention")
    conv_taps: int = 3
    conv_bias: bool = False
    rope_theta: float = 1000000.0
    tie_embeddings: bool = True


PRESETS: Mapping[str, LFM2Config] = {
    "tiny": LFM2Config(
        vocab_size=1024, width=128, pattern=("conv", "conv", "attention", "conv"), num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_width=352, max_context=512,
    ),
}  # fmt: skip


class ShortConv(nn.Module):
    """A convolution over a few tokens, with a gate before it and one after."""

    def __init__(self, config: LFM2Config) -> None:
        super().__init__()
        width, bias = config.width, config.conv_bias
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = CausalConv(width, config.conv_taps, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """That of its convolution."""
        return self.conv.state_specs(prefix, dtype)

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        b, c, x = self.in_proj(x).chunk(3, dim=-1)
        y, present = self.conv(b * x, state, prefix, step)
        out: Tensor = self.out_proj(c * y)
        return out, present


def lfm2(config: LFM2Config) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mixer = ShortConv(c) if kind == "conv" else c.attention(qk_norm=True, norm_eps=c.norm_eps)
        return Block(c.width, c.norm_eps, {"mixer": mixer}, GatedMLP(c.width, c.mlp_width))

    return Stack(c, map(block, c.pattern), rotary=c.rotary())


ARCHITECTURE = Architecture(
    name="lfm2", config=LFM2Config, build=lfm2, presets=PRESETS, huggingface=HUGGING_FACE, gguf=GGUF_FILES
)
