"""A recurrent mixer: an Elman, LSTM or GRU layer, projected back to the model's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm.ops import RecurrentWeights, elman, gru, lstm
from edgellm.ops.canonical import capturing
from edgellm_runtime.spec import BATCH, StateSpec

__all__ = ["KINDS", "RecurrentMixer"]

KINDS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}  # gates of each


class RecurrentMixer(nn.Module):
    """A recurrence over the sequence, followed by a projection.

    Args:
        kind: one of :data:`KINDS`.
        width: features of its input and output.
        hidden: features of the recurrence.
    """

    def __init__(self, kind: str, width: int, hidden: int) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        rows = KINDS[kind] * hidden
        self.weight_ih = nn.Parameter(torch.empty(rows, width).uniform_(-(width**-0.5), width**-0.5))
        self.weight_hh = nn.Parameter(nn.init.orthogonal_(torch.empty(rows, hidden)))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))
        self.out_proj = nn.Linear(hidden, width, bias=False)
        if kind == "lstm":  # remember by default: the forget gate starts open
            nn.init.ones_(self.bias_ih[hidden : 2 * hidden])

    @property
    def weights(self) -> RecurrentWeights:
        """The recurrence's parameters as the ops take them."""
        return RecurrentWeights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def state_specs(self, prefix: str, dtype: str) -> list[StateSpec]:
        """Its hidden state, ``prefix.h``, and for an LSTM its cell, ``prefix.c``."""
        names = ("h", "c") if self.kind == "lstm" else ("h",)
        return [StateSpec(f"{prefix}.{name}", (BATCH, self.hidden), dtype, "replace") for name in names]

    def forward(self, x: Tensor, state: State, prefix: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Run over x (batch, time, width); gives the same shape and its part of the new state."""
        names = [spec.name for spec in self.state_specs(prefix, "float32")]
        past = [state[n] if n in state else x.new_zeros(x.shape[0], self.hidden) for n in names]
        # without a state nobody reads what padding leaves behind; a graph serves every use
        lengths = step.lengths if state or capturing() else None
        if self.kind == "lstm":
            y, *present = lstm(x, past[0], past[1], self.weights, lengths)
        elif self.kind == "gru":
            y, *present = gru(x, past[0], self.weights, lengths)
        else:
            y, *present = elman(x, past[0], self.weights, lengths, activation=self.kind.removeprefix("rnn_"))
        out: Tensor = self.out_proj(y)
        return out, dict(zip(names, present, strict=True)) if state else {}
