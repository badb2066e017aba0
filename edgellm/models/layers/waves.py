"""Positions that are added: sines and, in the second half of the features, cosines (Vaswani et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Waves"]


class Waves(nn.Module):
    """A table of positions, arXiv:1706.03762; computed, never stored in a checkpoint.

    Args:
        positions: how many.
        width: features of each.
        slowest: whether the last frequency is 1 / 10000 itself, as Marian has it; otherwise that would be the next one.
    """

    table: Tensor  # (positions, width)

    def __init__(self, positions: int, width: int, *, slowest: bool = False) -> None:
        super().__init__()
        half = width // 2
        steps = torch.arange(half, dtype=torch.float64, device="cpu") / (max(1, half - 1) if slowest else half)
        angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * 10000.0**-steps
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], dim=1).float(), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (...) to (..., width)."""
        return self.table[positions]
