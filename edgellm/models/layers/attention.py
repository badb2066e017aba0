"""Self-attention with its projections, cache, and optional norms of queries and keys and rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.protocol import State, Step
from edgellm.ops import attention, window_attention
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
        output_bias: whether the output projection has one.
        scale: factor on the scores; None: 1 / sqrt(head_dim).
        qk_norm: whether each head's query and key pass an RMS norm before their rotation.
        norm_eps: added to the mean square in these norms.
        softcap: a bound that scores approach; 0 for none.
        window: how many tokens a token sees, itself among them; 0 for every one before it.
        ring: whether keys and values of a window lie in a ring of its size, which every step copies, in place of a
            cache of the whole context, which is written in place.
        gated: whether what was attended to is multiplied by the sigmoid of a gate, whose projection follows that of all
            queries in ``q_proj``.
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool,
        output_bias: bool = False, scale: float | None = None, qk_norm: bool = False, norm_eps: float = 1e-6,
        softcap: float = 0.0, window: int = 0, ring: bool = True,
        gated: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gated = gated
        self.softcap, self.window, self.ring = softcap, window, ring and window > 0
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(width, (2 if gated else 1) * num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=output_bias)
        self.norm_eps = norm_eps
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Its keys and values, named ``prefix.k`` and ``prefix.v``."""
        names = [f"{prefix}.{name}" for name in ("k", "v")]
        if self.ring:
            ring = (BATCH, self.num_kv_heads, self.window, self.head_dim)
            return [StateSpec(name, ring, dtype, "ring", axis=2, window=self.window) for name in names]
        shape = (BATCH, self.num_kv_heads, CAPACITY, self.head_dim)
        return [StateSpec(name, shape, dtype, "append") for name in names]

    def forward(
        self, x: Tensor, state: State, prefix: str, step: Step, rotary: RotaryTable | None,
        distances: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Attend over the state and x (batch, time, width); gives the same shape and its part of the new state.

        ``distances`` are those of :func:`edgellm.ops.attention`, which no ring takes.
        """
        more = {} if distances is None else {"distances": distances}
        q, gate = self.q_proj(x), None
        if self.gated:
            q, gate = q.chunk(2, dim=-1)  # (batch, time, num_heads * head_dim) each
        y, k, v = (window_attention if self.ring else attention)(
            q, self.k_proj(x), self.v_proj(x),
            state.get(f"{prefix}.k"), state.get(f"{prefix}.v"), step.past_lengths, step.lengths,
            None if rotary is None else rotary.cos, None if rotary is None else rotary.sin,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, scale=self.scale,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight, norm_eps=self.norm_eps,
            softcap=self.softcap, window=self.window, **more,
        )  # fmt: skip
        present: dict[str, Tensor] = {} if k is None or v is None else {f"{prefix}.k": k, f"{prefix}.v": v}
        out: Tensor = self.o_proj(y if gate is None else y * torch.sigmoid(gate))
        return out, present
