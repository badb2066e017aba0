"""A short causal convolution of each feature by itself, whose state is the last few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["CausalConv"]


class CausalConv(nn.Module):
    """y_t = sum_i w_i x_{t - taps + 1 + i} + b, feature by feature.

    It is a sum of shifted products, not a convolution of PyTorch's: for three or four taps that is the quickest form on
    a CPU, ahead of ONNX's Conv with a group for each feature and of ONNX Runtime's CausalConvWithState (docs/models.md
    has the figures).

    Args:
        width: features.
        taps: tokens that one output sees, itself included; at least 2.
        bias: whether a bias is added.
    """

    def __init__(self, width: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.width, self.taps = width, taps
        self.weight = nn.Parameter(torch.empty(width, 1, taps).uniform_(-(taps**-0.5), taps**-0.5))  # as nn.Conv1d's
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The tokens that are seen again, ``prefix.conv``."""
        return [StateSpec(f"{prefix}.conv", (BATCH, self.taps - 1, self.width), dtype, "replace")]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Convolve x (batch, time, width); gives the same shape and its part of the new state."""
        before, name = self.taps - 1, f"{prefix}.conv"
        past = state[name] if name in state else x.new_zeros(x.shape[0], before, self.width)
        seen = torch.cat([past, x], dim=1)  # (batch, taps - 1 + time, width)
        y = x * self.weight[:, 0, before]
        for i in range(before):
            y = y + seen[:, i : i - before] * self.weight[:, 0, i]
        if self.bias is not None:
            y = y + self.bias
        if not state:
            return y, {}
        last = step.lengths.long()[:, None] + torch.arange(before, device=x.device)  # (batch, taps - 1)
        return y, {name: seen.gather(1, last[:, :, None].expand(-1, -1, self.width))}
