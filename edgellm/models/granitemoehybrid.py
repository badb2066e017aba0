"""Granite 4: state spaces of Mamba-2, attention in a few of the layers, a mixture of experts and a shared one after it.

IBM 2025. Embedding, scaled -> N layers, each a norm and a mixer, then a norm and the experts, each beside a residual ->
norm -> head, scaled. What its files multiply residuals by is in the weights here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from edgellm.errors import ConfigError
from edgellm.models.granitemoehybrid_files import HUGGING_FACE
from edgellm.models.layers import Block, Experts, PackedMLP, Stack
from edgellm.models.registry import Architecture
from edgellm.models.shapes import PatternShape
from edgellm.models.state_spaces import HybridShape

__all__ = ["ARCHITECTURE", "PRESETS", "GraniteMoeHybridConfig", "granitemoehybrid"]


@dataclass(frozen=True, kw_only=True)
class GraniteMoeHybridConfig(PatternShape, HybridShape):
    """The shape of a Granite hybrid; ``mlp_width`` is the hidden features of one expert.

    Args:
        score_scale: factor on the scores of attention.
        rotates: whether attention turns by the position.
        num_experts: experts of a layer; 0 for the shared one alone.
        num_chosen: how many of them a token has.
        shared_width: hidden features of the shared one.
        activation: of all of them.
        embedding_scale: factor on embeddings.
        logit_scale: factor on logits.
    """

    KINDS = ("space", "attention")
    score_scale: float
    rotates: bool = False
    num_experts: int | None = None
    num_chosen: int = 1
    shared_width: int
    activation: str = "silu"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None and not 1 <= self.num_chosen <= self.num_experts:
            raise ConfigError(f"num_chosen is {self.num_chosen}; it must be from 1 to num_experts {self.num_experts}")


PRESETS: Mapping[str, GraniteMoeHybridConfig] = {
    "tiny": GraniteMoeHybridConfig(
        vocab_size=1024, width=128, pattern=("space", "space", "attention", "space"), num_heads=4, num_kv_heads=2,
        head_dim=32, score_scale=32**-0.5, mlp_width=96, max_context=512, space_heads=8, space_head_dim=32,
        state_size=32, num_experts=4, num_chosen=2, shared_width=192,
    ),
}  # fmt: skip


def granitemoehybrid(config: GraniteMoeHybridConfig) -> Stack:
    """The model with fresh weights."""
    c = config

    def block(kind: str) -> Block:
        mixer = c.state_space() if kind == "space" else c.attention(scale=c.score_scale)
        return Block(c.width, c.norm_eps, {kind: mixer}, _mlp(c))

    return Stack(
        c, map(block, c.pattern), rotary=c.rotary() if c.rotates else None, embedding_scale=c.embedding_scale,
        logit_scale=c.logit_scale,
    )  # fmt: skip


def _mlp(c: GraniteMoeHybridConfig) -> nn.Module:
    if c.num_experts is None:
        return PackedMLP(c.width, c.shared_width, activation=c.activation)
    return Experts(
        c.width, c.mlp_width, c.num_experts, c.num_chosen, shared_hidden=c.shared_width, shared_gated=False,
        packed=True, activation=c.activation,
    )  # fmt: skip


ARCHITECTURE = Architecture(
    name="granitemoehybrid", config=GraniteMoeHybridConfig, build=granitemoehybrid, presets=PRESETS,
    huggingface=HUGGING_FACE,
)  # fmt: skip
