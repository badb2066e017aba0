"""What RWKV's mixings begin with: tokens beside the one before each (Peng et al. 2023, arXiv:2305.13048)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["Shift"]


class Shift(nn.Module):
    """Tokens beside the token before each, and shares of both for several uses."""

    def __init__(self, width: int, uses: tuple[str, ...]) -> None:
        super().__init__()
        self.width, self.uses = width, uses
        for use in uses:
            self.register_parameter(use, nn.Parameter(torch.rand(1, 1, width)))

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """The token before."""
        return [StateSpec(prefix, (BATCH, 1, self.width), dtype, "replace")]

    def forward(self, x: Tensor, state: State, name: str, step: Step) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One (batch, time, width) for each use, and the token that the next step begins after."""
        past = state[name] if state else torch.zeros_like(x[:, :1])
        seen = torch.cat([past, x], dim=1)  # (batch, 1 + time, width)
        before = seen[:, :-1]
        shares = [getattr(self, use) for use in self.uses]
        mixed = [before + (x - before) * share for share in shares]  # what is stored is the share itself
        last = step.lengths.long()[:, None, None].expand(-1, 1, self.width)
        return mixed, {name: seen.gather(1, last)} if state else {}
