"""What PyTorch computes with each of a model's adapters, for the goldens that hold a bundle to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.models.protocol import LanguageModel, State, Step
from edgellm_exporters.proof.traces import Tokens, Trace, traces
from edgellm_runtime.spec import ADAPTER, StateSpec

__all__ = ["adapter_traces", "adapters_of"]


def adapters_of(model: LanguageModel) -> tuple[str, ...]:
    """The names of the adapters that a model's state chooses among."""
    return tuple(getattr(model, "adapters", ()))


def adapter_traces(model: LanguageModel, rows: Sequence[Tokens]) -> dict[str, list[Trace]]:
    """What PyTorch computes for rows with each adapter, by its name.

    Args:
        model: the reference, in eval mode.
        rows: token ids.
    """
    return {name: list(traces(_Chosen(model, number), rows)) for number, name in enumerate(adapters_of(model), start=1)}


class _Chosen(nn.Module):
    """A model all of whose rows have one adapter."""

    def __init__(self, model: LanguageModel, number: int) -> None:
        super().__init__()
        self.model: Any = model
        self.config, self.number = model.config, number

    def state_specs(self) -> Sequence[StateSpec]:
        """The model's."""
        specs: Sequence[StateSpec] = self.model.state_specs()
        return specs

    def forward(self, tokens: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's step."""
        numbers = torch.full_like(state[ADAPTER], self.number)
        found: tuple[Tensor, dict[str, Tensor]] = self.model(tokens, {**state, ADAPTER: numbers}, step)
        return found
