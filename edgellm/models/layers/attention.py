"""Self-attention with its projections, cache and optional rotary positions."""

from __future__ import annotations

from torch import Tensor, nn

from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.protocol import State, Step
from edgellm.ops import attention
from edgellm_runtime.spec import BATCH, CAPACITY, StateSpec

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head causal self-attention, with grouped keys and values.

    Args:
        width: features of its input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: features of one head.
        bias: whether the query, key and value projections have a bias.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Its keys and values, named ``prefix.k`` and ``prefix.v``."""
        shape = (BATCH, self.num_kv_heads, CAPACITY, self.head_dim)
        return [StateSpec(f"{prefix}.{name}", shape, dtype, "append") for name in ("k", "v")]

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend over the state and x (batch, time, width); gives the same shape and its part of the new state."""
        y, k, v = attention(
            self.q_proj(x), self.k_proj(x), self.v_proj(x),
            state.get(f"{prefix}.k"), state.get(f"{prefix}.v"), step.past_lengths, step.lengths,
            None if rotary is None else rotary.cos, None if rotary is None else rotary.sin,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, scale=self.head_dim**-0.5,
        )  # fmt: skip
        present: dict[str, Tensor] = {} if k is None or v is None else {f"{prefix}.k": k, f"{prefix}.v": v}
        out: Tensor = self.o_proj(y)
        return out, present
