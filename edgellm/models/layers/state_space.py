"""The state space of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), with its projections, convolution and gated norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.layers.convolution import CausalConv
from edgellm.models.protocol import State, Step
from edgellm.ops import linear_attention
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["GATED_NORMS", "StateSpaceMixer"]

GATED_NORMS = ("of the gated", "before the gate", "none")


class StateSpaceMixer(nn.Module):
    """A fading memory a head, which takes in B x and is read by C; then a gate, a norm and a projection back.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T and y_t = C_t S_t + D x_t, where x, B and C have passed a convolution.

    Args:
        width: features of its input and output.
        num_heads: heads.
        head_dim: features of x in one head.
        state_size: features of B and C.
        num_groups: how many B and C there are, each shared by neighbouring heads; divides ``num_heads``.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projection in has one.
        output_bias: whether the projection back has one.
        norm: one of :data:`GATED_NORMS`: what is normed, the features of each group by themselves.
        norm_eps: added to the mean square in it.
        least_step: what no dt is below.
    """

    def __init__(
        self, width: int, num_heads: int, head_dim: int, state_size: int, *, num_groups: int = 1, conv_taps: int = 4,
        conv_bias: bool = True, bias: bool = False, output_bias: bool = False, norm: str = GATED_NORMS[0],
        norm_eps: float = 1e-5, least_step: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        assert norm in GATED_NORMS
        self.num_heads, self.head_dim, self.state_size, self.num_groups = num_heads, head_dim, state_size, num_groups
        self.kind, self.norm_eps, self.least_step = norm, norm_eps, least_step
        self.inner, self.keys = num_heads * head_dim, num_groups * state_size  # features of x, and of B and C
        mixed = self.inner + 2 * self.keys
        self.in_proj = nn.Linear(width, self.inner + mixed + num_heads, bias=bias)
        self.conv = CausalConv(mixed, conv_taps, bias=conv_bias)
        self.dt_offset = nn.Parameter(torch.rand(num_heads).mul(4.6).sub(6.9).exp().expm1().log())  # dt 0.001 to 0.1
        self.a_log = nn.Parameter(torch.arange(1.0, num_heads + 1).log())
        self.d = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.Parameter(torch.ones(self.inner)) if norm != "none" else None
        self.out_proj = nn.Linear(self.inner, width, bias=output_bias)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """S of each head, and the state of the convolution."""
        shape = (BATCH, self.num_heads, self.state_size, self.head_dim)
        return [StateSpec(f"{prefix}.s", shape, dtype, "replace"), *self.conv.state_specs(prefix, dtype)]

    def forward(self, u: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        batch, time, _ = u.shape
        z, xbc, dt = torch.split(self.in_proj(u), [self.inner, self.conv.width, self.num_heads], dim=-1)
        xbc, present = self.conv(xbc, state, prefix, step)
        x, b, q = torch.split(F.silu(xbc), [self.inner, self.keys, self.keys], dim=-1)
        valid = torch.arange(time, device=u.device) < step.lengths[:, None]
        dt = F.softplus(dt + self.dt_offset)
        if self.least_step:
            dt = dt.clamp(min=self.least_step)
        dt = dt * valid[:, :, None]  # (batch, time, heads); padding adds and fades nothing
        x = x.reshape(batch, time, self.num_heads, self.head_dim)
        v = (x * dt[..., None]).flatten(2)
        y, s = linear_attention(
            q, b, v, -dt * self.a_log.exp(), state.get(f"{prefix}.s"), num_heads=self.num_heads,
            num_groups=self.num_groups,
        )  # fmt: skip
        y = self._gated((y.reshape(x.shape) + x * self.d[:, None]).flatten(2), F.silu(z))  # (batch, time, inner)
        out: Tensor = self.out_proj(y)
        return out, present | {f"{prefix}.s": s} if state else {}

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.kind == "before the gate":
            return self._normed(y) * gate
        return self._normed(y * gate)

    def _normed(self, y: Tensor) -> Tensor:
        if self.norm is None:
            return y
        if self.num_groups == 1:
            return F.rms_norm(y, self.norm.shape, self.norm, self.norm_eps)
        apart = y.reshape(*y.shape[:-1], self.num_groups, -1)  # (batch, time, groups, inner / groups)
        return F.rms_norm(apart, apart.shape[-1:], None, self.norm_eps).flatten(2) * self.norm
