"""A model of whole numbers that carries states of every update: what a row has read shows in its logits, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.session import Session
from edgellm_runtime.spec import PAST_LENGTHS, Signature, StateSpec, TensorSpec
from edgellm_runtime.state import State

VOCAB = 61
APPENDED = StateSpec("all", ("batch", "capacity"), "int64", "append")
REPLACED = StateSpec("hash", ("batch", 1), "int64", "replace")
STATIC = StateSpec("first", ("batch", 2), "int64", "static")


def ring(slots: int, window: int, name: str = "last") -> StateSpec:
    return StateSpec(name, ("batch", slots, 2), "int64", "ring", axis=1, window=window)


def exact_session(*specs: StateSpec, max_context: int, backend: type[HostBackend] | None = None) -> Session:
    """Steps of a model that carries just these states."""
    inputs = (TensorSpec("tokens", ("batch", "time"), "int64"), TensorSpec(PAST_LENGTHS, ("batch",), "int32"))
    signature = Signature(inputs, (TensorSpec("logits", ("batch", "count", VOCAB), "float32"),), specs)
    made = (backend or ExactBackend)(specs)  # type: ignore[call-arg]
    return Session(made, signature, max_context=max_context, ragged_chunks=True)


class ExactBackend(HostBackend):
    """Logits that depend on each token that a state says a row can see, in order, and on nothing else."""

    device = "cpu"

    def __init__(self, specs: Sequence[StateSpec]) -> None:
        self._specs = specs
        self._table = np.random.default_rng(7).normal(size=(1009, VOCAB)).astype(np.float32)

    def run(self, tokens: Any, lengths: Any, logit_positions: Any, state: State) -> Any:
        for name, spare in state.spares.items():
            spare[...] = state.tensors[name]
        logits = np.zeros((*logit_positions.shape, VOCAB), dtype=np.float32)
        for row, length in enumerate(lengths):
            seen = [self._read(tokens[row], at, int(length), row, state) for at in range(tokens.shape[1])]
            for i, position in enumerate(logit_positions[row]):
                logits[row, i] = self._table[seen[position]]
        state.swap()
        return logits

    def _read(self, tokens: Any, at: int, length: int, row: int, state: State) -> int:
        """One token into the new state, and what the row has seen then as a number; padding is written nowhere."""
        past, position, seen = int(state.lengths[row]), int(state.lengths[row]) + at, []
        for spec in self._specs:
            new = (state.tensors if spec.in_place else state.spares)[spec.name][row]
            if at >= length:
                if spec.in_place:  # as kernels do: these slots have no meaning yet
                    new[position] = -1
            elif spec.update == "append":
                new[position] = tokens[at]
                seen += new[: position + 1].tolist()
            elif spec.update == "ring":
                new[position % len(new)] = tokens[at]
                first = max(0, position + 1 - (spec.window or 0))
                seen += [n for p in range(first, position + 1) for n in new[p % len(new)].tolist()]
            elif spec.update == "replace":
                new[0] = (new[0] * 31 + tokens[at] + 7) % 1000003
                seen += new.tolist()
            else:
                if past + at == 0:
                    new[...] = tokens[0] + 1
                seen += new.tolist()
        found = 0
        for number in seen:
            found = (found * 31 + int(number) + 7) % 1009
        return found
