"""The feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv:2002.05202.

    Args:
        width: features of its input and output.
        hidden: features between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y
