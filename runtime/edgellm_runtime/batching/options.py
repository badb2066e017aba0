"""How many requests run and wait, and what they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from edgellm_runtime.arguments import check_flag, check_integer

__all__ = ["BatchKeywords", "BatchOptions"]


class BatchKeywords(TypedDict, total=False):
    """The keywords of ``Model.scheduler``: :class:`BatchOptions`' fields, none required."""

    rows: int
    queue: int
    piece: int | None
    exact: bool
    state_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a model's requests share it.

    Args:
        rows: answers that run at once.
        queue: requests that may wait for a place among those; further ones are refused, or wait to be taken.
        piece: tokens of a prompt that are read between two tokens of the others; None: as many as a prompt that is
            alone is read in, so that it leaves the same bits. Fewer make the others wait less.
        exact: each answer has the very bits that it has alone, because rows are stepped one by one. That is several
            times as slow; without it rows are stepped together, and whether their bits are those depends on the
            kernels (docs/serving.md has the table).
        state_bytes: what all states may take; a request waits until there is room for the whole of it. None: no limit.

    Raises:
        OptionError: a value is outside its range.
    """

    rows: int = 8
    queue: int = 64
    piece: int | None = None
    exact: bool = False
    state_bytes: int | None = None

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, 1, 1024)
        check_integer("queue", self.queue, 1, 2**20)
        if self.piece is not None:
            check_integer("piece", self.piece, 1, 2**20)
        check_flag("exact", self.exact)
        if self.state_bytes is not None:
            check_integer("state_bytes", self.state_bytes, 1)
