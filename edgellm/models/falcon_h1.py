"""Falcon-H1: in every layer a state space and attention side by side, then a gated MLP.

TII 2025, arXiv:2507.22448. Embedding, scaled -> N layers, each a norm, the sum of both mixers and a norm and an MLP
beside residuals -> norm -> head, scaled. Its files scale what goes into layers and comes out of them by numbers of
their own: here these are in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.errors import ConfigError
from edgellm.models.falcon_h1_files import HUGGING_FACE
from edgellm.models.layers import Block, GatedMLP, Stack
from edgellm.models.layers.state_space import GATED_NORMS
from edgellm.models.registry import Architecture
from edgellm.models.state_spaces import HybridShape

__all__ = ["ARCHITECTURE", "PRESETS", "FalconH1Config", "falcon_h1"]


@dataclass(frozen=True, kw_only=True)
class FalconH1Config(HybridShape):
    """The shape of a Falcon-H1.

    Args:
        num_layers: layers.
        space_norm: what is normed within the state space, one of :data:`GATED_NORMS`.
        space_output_bias: whether its projection back has a bias.
        mlp_bias: whether the projections of the MLP have one.
        activation: of the MLP.
        embedding_scale: factor on embeddings.
        logit_scale: factor on logits.
    """

    num_layers: int
    space_norm: str = "none"
    space_output_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space_norm not in GATED_NORMS:
            raise ConfigError(f"space_norm is {self.space_norm!r}; it must be one of {', '.join(GATED_NORMS)}")


PRESETS: Mapping[str, FalconH1Config] = {
    "tiny": FalconH1Config(
        vocab_size=1024, width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=352,
        max_context=512, space_heads=8, space_head_dim=16, state_size=32,
    ),
}  # fmt: skip


def falcon_h1(config: FalconH1Config) -> Stack:
    """The model with fresh weights."""
    c = config

    def block() -> Block:
        space = c.state_space(norm=c.space_norm, output_bias=c.space_output_bias)
        mlp = GatedMLP(c.width, c.mlp_width, bias=c.mlp_bias, activation=c.activation)
        return Block(c.width, c.norm_eps, {"space": space, "attention": c.attention()}, mlp)

    return Stack(
        c, (block() for _ in range(c.num_layers)), rotary=c.rotary(), embedding_scale=c.embedding_scale,
        logit_scale=c.logit_scale,
    )  # fmt: skip


ARCHITECTURE = Architecture(
    name="falcon_h1", config=FalconH1Config, build=falcon_h1, presets=PRESETS, huggingface=HUGGING_FACE
)
