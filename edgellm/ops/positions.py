"""Taking some positions out of a sequence, so that a step projects only what is asked for to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from edgellm.ops.schema import Op

__all__ = ["TAKE_POSITIONS", "positions_noted", "take_positions"]

_Taken = list[tuple[Tensor, Tensor]]
_noted: ContextVar[_Taken | None] = ContextVar("_noted", default=None)


def take_positions_reference(hidden: Tensor, positions: Tensor) -> Tensor:
    """See :func:`take_positions`."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))


TAKE_POSITIONS = Op(
    name="TakePositions",
    inputs=("hidden", "positions"),
    outputs=("taken",),
    like=lambda hidden, positions: [(hidden.dtype, (*positions.shape, hidden.shape[2]))],
    reference=take_positions_reference,
)


def take_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Pick positions from each row.

    Args:
        hidden: (batch, time, features).
        positions: (batch, count) int64, each in [0, time).

    Returns:
        (batch, count, features).
    """
    if (seen := _noted.get()) is not None:
        seen.append((hidden, positions))
    taken: Tensor = TAKE_POSITIONS(hidden, positions)
    return taken


@contextmanager
def positions_noted() -> Iterator[_Taken]:
    """What :func:`take_positions` is given meanwhile, call by call: so a model's last hidden state is found."""
    seen: _Taken = []
    token = _noted.set(seen)
    try:
        yield seen
    finally:
        _noted.reset(token)
