"""The selective state space of Mamba (Gu and Dao 2023, arXiv:2312.00752), with its projections and convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.layers.convolution import CausalConv
from edgellm.models.protocol import State, Step
from edgellm.ops import selective_scan
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["SelectiveMixer"]


class SelectiveMixer(nn.Module):
    """out((scan(x) + D x) * silu(z)), with x and z projected from the input and x passed through a convolution.

    Args:
        width: features of its input and output.
        inner: features of x, each with a state of its own.
        state_size: numbers in a state.
        rank: features that steps dt are made of.
        conv_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections in and out have one.
        norms: the RMS norms of dt, B and C: ``none``, ``plain`` or ``learned`` ones, with gains.
        norm_eps: added to the mean square in them.
    """

    def __init__(
        self, width: int, inner: int, state_size: int, *, rank: int, conv_taps: int = 4, conv_bias: bool = True,
        bias: bool = False, norms: str = "none", norm_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        assert norms in ("none", "plain", "learned")
        self.inner, self.sizes = inner, [rank, state_size, state_size]  # of dt, B and C
        self.in_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.conv = CausalConv(inner, conv_taps, bias=conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.norms = nn.ModuleList(
            nn.RMSNorm(size, eps=norm_eps, elementwise_affine=norms == "learned")
            for size in (self.sizes if norms != "none" else ())
        )
        self.dt_proj = nn.Linear(rank, inner)
        self.a_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self.dt_proj.bias = nn.Parameter(torch.rand(inner).mul(4.6).sub(6.9).exp().expm1().log())  # dt 0.001 to 0.1

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The state of each feature and that of the convolution."""
        shape = (BATCH, self.inner, self.sizes[1])
        return [StateSpec(f"{prefix}.h", shape, dtype, "replace"), *self.conv.state_specs(prefix, dtype)]

    def forward(self, u: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and this layer's part of the new state."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, present = self.conv(x, state, prefix, step)
        x = F.silu(x)
        parts = torch.split(self.x_proj(x), self.sizes, dim=-1)
        dt, b, c = (norm(part) for norm, part in zip(self.norms, parts, strict=True)) if self.norms else parts
        valid = torch.arange(u.shape[1], device=u.device) < step.lengths[:, None]
        dt = F.softplus(self.dt_proj(dt)) * valid[:, :, None]  # (batch, time, inner); padding adds and fades nothing
        y, h = selective_scan(x, dt, -self.a_log.exp(), b, c, state.get(f"{prefix}.h"))
        out: Tensor = self.out_proj((y + x * self.d) * F.silu(z))
        return out, present | {f"{prefix}.h": h} if state else {}
