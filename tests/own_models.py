"""A model of one's own that can be exported, for tests that spoil one thing in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm.ops import RecurrentWeights, lstm, take_positions
from edgellm_runtime import StateSpec


@dataclass(frozen=True)
class Config:
    vocab_size: int = 61
    max_context: int = 32


class Sound(nn.Module):
    """A recurrence that can be exported; the others below spoil one thing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.embedding = nn.Embedding(61, 32)
        self.cell = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 61)

    def state_specs(self) -> list[StateSpec]:
        return [StateSpec(name, ("batch", 32), "float32", "replace") for name in ("h", "c")]

    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, h, c = lstm(x, state["h"], state["c"], self.weights(), step.lengths)
        return y, {"h": h, "c": c}

    def weights(self) -> RecurrentWeights:
        c = self.cell
        return RecurrentWeights(c.weight_ih_l0, c.weight_hh_l0, c.bias_ih_l0, c.bias_hh_l0)

    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        step = step or Step.whole(tokens)
        zeros = torch.zeros(tokens.shape[0], 32)
        y, present = self.run(self.embedding(tokens), state or {"h": zeros, "c": zeros}, step)
        return self.head(take_positions(y, step.logit_positions)), present
