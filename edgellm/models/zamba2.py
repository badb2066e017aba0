"""Zamba2: state spaces of Mamba-2 in every layer, and in some, attention and an MLP that these layers share.

Zyphra 2024, arXiv:2411.15242. Embedding -> N layers, each a norm and a state space beside a residual -> norm -> head.
What goes into a few of the state spaces has the output of a shared block added: attention over the layer's input beside
the embeddings, then an MLP. There are several such blocks, which take turns; each use has low-rank changes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgellm.errors import ConfigError
from edgellm.models.layers import Block, RotaryTable, SelfAttention, Stack
from edgellm.models.layers.mlp import activation_of
from edgellm.models.protocol import State, Step
from edgellm.models.registry import Architecture
from edgellm.models.shapes import PatternShape
from edgellm.models.state_spaces import HybridShape
from edgellm.models.zamba2_files import HUGGING_FACE
from edgellm.ops import attention, take_positions
from edgellm_runtime.spec import StateSpec

__all__ = ["ARCHITECTURE", "PRESETS", "Zamba2", "Zamba2Config"]


@dataclass(frozen=True, kw_only=True)
class Zamba2Config(PatternShape, HybridShape):
    """The shape of a Zamba2, whose layers are a state space alone, or one after a ``shared`` block.

    Args:
        num_blocks: shared blocks, which take turns.
        rank: of the changes that each use of a block has for itself.
        attention_changes: whether attention has such changes too, not the MLP alone.
        rotates: whether attention turns by the position.
        mlp_bias: whether the projections of the MLP have a bias.
        least_step: what no dt of a state space is below.
        activation: of the MLP.
    """

    KINDS = ("space", "shared")
    num_blocks: int = 1
    rank: int = 128
    attention_changes: bool = False
    rotates: bool = False
    mlp_bias: bool = False
    least_step: float = 0.001
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_changes and self.num_kv_heads != self.num_heads:
            raise ConfigError(f"num_kv_heads is {self.num_kv_heads}; with attention_changes it must be num_heads")


PRESETS: Mapping[str, Zamba2Config] = {
    "tiny": Zamba2Config(
        vocab_size=1024, width=128, pattern=("space", "shared", "space", "shared"), num_heads=4, num_kv_heads=4,
        head_dim=64, mlp_width=352, max_context=512, space_heads=8, space_head_dim=32, state_size=32, rank=16,
        rotates=True, tie_embeddings=True,
    ),
}  # fmt: skip


def _changes(uses: Sequence[int], width: int, rank: int, out: int) -> nn.ModuleDict:
    """A change of low rank for each use of a block."""
    return nn.ModuleDict(
        {str(use): nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)) for use in uses}
    )


class SharedAttention(SelfAttention):
    """Attention over twice the width, whose projections have changes of each use's own."""

    def __init__(self, config: Zamba2Config, uses: Sequence[int]) -> None:
        c, both = config, 2 * config.width
        super().__init__(both, c.num_heads, c.num_kv_heads, c.head_dim, bias=False, scale=(c.head_dim / 2) ** -0.5)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.width, bias=False)
        uses = uses if c.attention_changes else ()
        self.q_changes, self.k_changes, self.v_changes = (
            _changes(uses, both, c.rank, c.num_heads * c.head_dim) for _ in range(3)
        )

    def used(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None, use: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, 2 width) to (batch, time, width), and its part of the new state."""
        projections = ((self.q_proj, self.q_changes), (self.k_proj, self.k_changes), (self.v_proj, self.v_changes))
        q, k, v = (_changed(proj, changes, x, use) for proj, changes in projections)
        y, key, value = attention(
            q, k, v, state.get(f"{prefix}.k"), state.get(f"{prefix}.v"), step.past_lengths, step.lengths,
            None if rotary is None else rotary.cos, None if rotary is None else rotary.sin,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, scale=self.scale,
        )  # fmt: skip
        out: Tensor = self.o_proj(y)
        return out, {} if key is None or value is None else {f"{prefix}.k": key, f"{prefix}.v": value}


def _changed(projection: nn.Module, changes: nn.ModuleDict, x: Tensor, use: int) -> Tensor:
    y: Tensor = projection(x)
    return y + changes[str(use)](x) if changes else y


class SharedBlock(nn.Module):
    """Attention over what comes beside the embeddings, then a gated MLP; no residuals."""

    def __init__(self, config: Zamba2Config, uses: Sequence[int]) -> None:
        super().__init__()
        c = config
        self.norm = nn.RMSNorm(2 * c.width, eps=c.norm_eps)
        self.attention = SharedAttention(c, uses)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.activation = activation_of(c.activation)
        self.in_proj = nn.Linear(c.width, 2 * c.mlp_width, bias=c.mlp_bias)
        self.out_proj = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias)
        self.changes = _changes(uses, c.width, c.rank, 2 * c.mlp_width)

    def forward(
        self, x: Tensor, embedded: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None, use: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) and the embeddings to the same shape, and its part of the new state."""
        y, present = self.attention.used(
            self.norm(torch.cat([x, embedded], dim=-1)), state, prefix, step, rotary, use
        )  # fmt: skip
        gate, up = _changed(self.in_proj, self.changes, self.mlp_norm(y), use).chunk(2, dim=-1)
        return self.out_proj(self.activation(gate) * up), present


class SharingLayer(nn.Module):
    """A state space into which a shared block's output goes besides."""

    def __init__(self, config: Zamba2Config, shared: SharedBlock, use: int) -> None:
        super().__init__()
        self.shared, self.use = shared, use
        self.linear = nn.Linear(config.width, config.width, bias=False)
        self.inner = _space(config)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Keys and values of this use, and the state space's."""
        return [*self.shared.attention.state_specs(prefix, dtype), *self.inner.state_specs(prefix, dtype)]

    def forward(
        self, x: Tensor, embedded: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) and the embeddings to the same shape, and this layer's part of the new state."""
        y, present = self.shared(x, embedded, state, prefix, step, rotary, self.use)
        y, new = self.inner.mixed(x + self.linear(y), state, prefix, step, rotary)
        return x + y, present | new


def _space(c: Zamba2Config) -> Block:
    return Block(c.width, c.norm_eps, {"space": c.state_space(norm_eps=1e-5, least_step=c.least_step)})


class Zamba2(Stack):
    """See the module's description; follows :class:`edgellm.models.protocol.LanguageModel`."""

    def __init__(self, config: Zamba2Config) -> None:
        c, count = config, config.pattern.count("shared")
        super().__init__(c, (), rotary=c.rotary() if c.rotates else None)
        blocks = [SharedBlock(c, range(first, count, c.num_blocks)) for first in range(min(c.num_blocks, count))]
        uses = iter(range(count))
        self.layers = nn.ModuleList(
            _space(c) if kind == "space" else SharingLayer(c, blocks[(use := next(uses)) % c.num_blocks], use)
            for kind in c.pattern
        )

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        state, step = state or {}, step or Step.whole(tokens)
        x = embedded = self.embedded(tokens)  # (batch, time, width)
        present: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            more = (embedded,) if isinstance(layer, SharingLayer) else ()
            x, new = layer(x, *more, state, f"layers.{i}", step, self.rotary)
            present |= new
        return self.head(take_positions(self.norm(x), step.logit_positions)), present


ARCHITECTURE = Architecture(name="zamba2", config=Zamba2Config, build=Zamba2, presets=PRESETS, huggingface=HUGGING_FACE)
