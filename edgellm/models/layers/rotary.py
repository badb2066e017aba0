"""The table of angles that rotary positions turn by (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["RotaryTable"]


class RotaryTable(nn.Module):
    """cos and sin of position x frequency; computed, never stored in a checkpoint.

    Args:
        head_dim: features of one head.
        max_context: how many positions.
        theta: the base of the frequencies.
        factors: (head_dim / 2,), each frequency is divided by its own; empty: by none.
        amplitude: factor on cos and sin.
    """

    cos: Tensor  # (max_context, head_dim / 2)
    sin: Tensor

    def __init__(
        self, head_dim: int, max_context: int, theta: float, *, factors: Sequence[float] = (), amplitude: float = 1.0
    ) -> None:
        super().__init__()
        # float64, then rounded once: every target gets the same table; on the CPU even while weights are on "meta"
        half = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
        frequencies = theta ** (-half / head_dim)
        if factors:
            frequencies = frequencies / torch.tensor(factors, dtype=torch.float64, device="cpu")
        angles = torch.arange(max_context, dtype=torch.float64, device="cpu")[:, None] * frequencies
        self.register_buffer("cos", (angles.cos() * amplitude).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * amplitude).float(), persistent=False)
