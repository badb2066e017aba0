"""The simple recurrent unit of small translators (SSRU: Kim et al. 2019, aclanthology.org/D19-5632)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm.ops import source_mask, token_by_token
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["SimpleRecurrence"]


class SimpleRecurrence(nn.Module):
    """relu(c), with c fading by a gate: c = f * c + (1 - f) * W x, f = sigmoid(W_f x + b_f)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.in_proj, self.gate_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Its memory, ``prefix.c``."""
        return [StateSpec(f"{prefix}.c", (BATCH, self.width), dtype, "replace")]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, time, width) to the same shape, and the memory after each row's last valid token."""
        past = state.get(f"{prefix}.c", torch.zeros_like(x[:, 0]))
        gate, valid = self.gate_proj(x).sigmoid(), source_mask(x[..., 0], step.lengths)[:, :, None]
        kept, new = torch.where(valid, gate, 1.0), torch.where(valid, (1.0 - gate) * self.in_proj(x), 0.0)
        present, y = token_by_token(_step, [past], [kept, new])
        return y.relu(), {f"{prefix}.c": present}


def _step(state: Tensor, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    state = kept * state + new
    return state, state
