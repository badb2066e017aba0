"""Taking some positions out of a sequence, so that a step projects only what is asked for to the vocabulary."""

from __future__ import annotations

from torch import Tensor

from edgellm.ops.canonical import capturing, emit

__all__ = ["take_positions"]


def take_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Pick positions from each row.

    Args:
        hidden: (batch, time, features).
        positions: (batch, count) int64, each in [0, time).

    Returns:
        (batch, count, features).
    """
    if capturing():
        return emit("TakePositions", [hidden, positions], [(hidden.dtype, (*positions.shape, hidden.shape[2]))])[0]
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))
