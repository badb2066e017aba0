"""Attention to a source's tokens with its projections: within an encoder, and from a decoder to what it gave."""

from __future__ import annotations

from torch import Tensor, nn

from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.protocol import State
from edgellm.ops import source_attention
from edgellm.ops.attention import rotary, split_heads
from edgellm_runtime.spec import BATCH, SOURCE, StateSpec

__all__ = ["SOURCE_MASK", "SourceAttention", "mask_spec"]

SOURCE_MASK = "source.mask"  # the state that says which tokens of the sources are no padding


def mask_spec() -> StateSpec:
    """The state :data:`SOURCE_MASK`, (batch, source) bool."""
    return StateSpec(SOURCE_MASK, (BATCH, SOURCE), "bool", "static")


class SourceAttention(nn.Module):
    """Multi-head attention to every token of a source.

    Args:
        width: features of queries' inputs and of its output.
        num_heads: query heads.
        head_dim: features of one head.
        num_kv_heads: key and value heads; divides ``num_heads``; None: as many.
        bias: whether its projections have a bias.
        scale: factor on the scores; None: 1 / sqrt(head_dim).
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, *, num_kv_heads: int | None = None, bias: bool = False,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads or num_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=bias)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Keys and values of a source, named ``prefix.cross_k`` and ``prefix.cross_v``."""
        shape = (BATCH, self.num_kv_heads, SOURCE, self.head_dim)
        return [StateSpec(f"{prefix}.cross_{name}", shape, dtype, "static") for name in ("k", "v")]

    def keys(self, x: Tensor, positions: Tensor | None = None, table: RotaryTable | None = None) -> list[Tensor]:
        """Keys and values (batch, kv_heads, source, head_dim) of what an encoder has, (batch, source, width).

        Args:
            x: of the source.
            positions: (batch, source), which keys are rotated by, where there is a table.
            table: of the angles, or None for no rotation.
        """
        k, v = split_heads(self.k_proj(x), self.num_kv_heads), split_heads(self.v_proj(x), self.num_kv_heads)
        return [k if table is None or positions is None else rotary(k, table.cos, table.sin, positions), v]

    def states(self, x: Tensor, prefix: str) -> dict[str, Tensor]:
        """What :meth:`state_specs` declares, of what an encoder gave."""
        return dict(zip((f"{prefix}.cross_k", f"{prefix}.cross_v"), self.keys(x), strict=True))

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None,
        positions: Tensor | None = None, table: RotaryTable | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend from x (batch, time, width) to keys and values; gives the same shape.

        Args:
            x: what asks.
            k: of :meth:`keys`.
            v: likewise.
            mask: (batch, source) bool, which tokens of the source are there.
            bias: (1, num_heads, time, source), added to the scores, or None.
            positions: as for :meth:`keys`, of the queries.
            table: likewise.
        """
        q = split_heads(self.q_proj(x), self.num_heads)  # (batch, heads, time, head_dim)
        if table is not None and positions is not None:
            q = rotary(q, table.cos, table.sin, positions)
        y: Tensor = self.o_proj(source_attention(q, k, v, mask, bias, scale=self.scale))
        return y

    def answer(self, x: Tensor, state: State, prefix: str) -> Tensor:
        """:meth:`forward` to the keys and values that a state holds of the sources."""
        y: Tensor = self(x, state[f"{prefix}.cross_k"], state[f"{prefix}.cross_v"], state[SOURCE_MASK])
        return y
