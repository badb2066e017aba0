"""A row in pieces: so many slots of what it only appends to, to be put together again in another state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.snapshot import Snapshot
from edgellm_runtime.state.state import State

__all__ = ["appended", "filled", "slots_of"]

Array = NDArray[Any]


def appended(specs: Sequence[StateSpec]) -> tuple[StateSpec, ...]:
    """Of a model's states those with a slot for each token."""
    return tuple(spec for spec in specs if spec.update == "append")


def slots_of(state: State, spans: Sequence[tuple[int, int]]) -> list[dict[str, Array]]:
    """Copies of some slots of a state of one row.

    Args:
        state: of one row.
        spans: from which token to which, for each copy.

    Returns:
        For each span, arrays by state name, in this process's memory.
    """
    made: list[dict[str, Array]] = [{} for _ in spans]
    for spec in appended(state.specs) if spans else ():
        whole = state.storage.read(spec, state.tensors[spec.name])  # once: a device hands out all of it
        for piece, (start, end) in zip(made, spans, strict=True):
            piece[spec.name] = whole[(*_before(spec), slice(start, end))].copy()
    return made


def filled(state: State, pieces: Sequence[Mapping[str, Array]], length: int, snapshot: Snapshot | None) -> None:
    """Make an empty row what it was when its pieces were copied.

    Args:
        state: of one row that holds nothing, with room for it.
        pieces: of :func:`slots_of`, those of the row's first ``length`` tokens in order.
        length: tokens.
        snapshot: of the row's recurrences and rings at that length; None where the model has neither.
    """
    for spec in appended(state.specs):
        whole = np.concatenate([piece[spec.name] for piece in pieces], axis=len(_before(spec)))
        state.storage.write(spec, state.tensors[spec.name], whole)
    state.lengths[0] = length
    if snapshot is not None:
        state.restore(snapshot)


def _before(spec: StateSpec) -> tuple[slice, ...]:
    """The axes before that of the slots, whole."""
    assert spec.capacity_axis is not None
    return (slice(None),) * spec.capacity_axis
