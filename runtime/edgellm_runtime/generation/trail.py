"""Snapshots of a text as it is read, so that what cannot be rewound goes back to one and reads the rest again.

A recurrence holds what it has become and not what it was. Every so many tokens a copy of it is kept; a rewind goes to
the last copy that is not beyond its aim, and whoever goes on from there reads the few tokens between. Caches that only
grow are no part of it, so a model that has nothing else has no snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.session import Session
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state import State
from edgellm_runtime.state.snapshot import Snapshot, overwritten

__all__ = ["BLOCK", "EVERY", "MOST", "Trail", "read_text"]

BLOCK = 32  # tokens; a text's last snapshot is at a multiple of this
EVERY = 256  # tokens between snapshots; a multiple of BLOCK
MOST = 16  # snapshots of one text
_FOLLOWED = 3  # of one that only goes on


class Trail:
    """The snapshots of one row.

    There is one at every multiple of :data:`EVERY` tokens, one at the last multiple of :data:`BLOCK`, and one after
    every prompt; never more than ``most``, which bounds their memory to ``most`` times the bytes of the row's
    recurrences and rings. What is too much goes where snapshots are nearest to one another, so that those of a long
    text lie further apart.

    Args:
        specs: of the model's states.
        most: snapshots; 0 for none.
    """

    def __init__(self, specs: Sequence[StateSpec], most: int = MOST) -> None:
        self.on = most > 0 and bool(overwritten(specs))
        self._most = most
        self._kept: dict[int, Snapshot] = {}  # by length, which rises
        self._passing: int | None = None  # the length of one that the next will replace

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens had been read at each."""
        return tuple(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(snapshot.nbytes for snapshot in self._kept.values())

    def at(self, length: int) -> Snapshot | None:
        """The one after just so many tokens."""
        return self._kept.get(length)

    def copy(self) -> Trail:
        """Another with the same snapshots, which nothing changes."""
        made = Trail.__new__(Trail)
        made.on, made._most, made._kept, made._passing = self.on, self._most, dict(self._kept), self._passing
        return made

    def followed(self) -> Trail:
        """One of what comes after this, which holds little: the last snapshot here, and then the last on its way."""
        made = self.copy()
        made._most, made._kept = min(self._most, _FOLLOWED), dict(list(self._kept.items())[-1:])
        return made

    def mark(self, state: State) -> None:
        """Take one here.

        Args:
            state: of one row.
        """
        if self.on:
            self._add(state.snapshot())

    def note(self, state: State, row: int = 0) -> None:
        """Take one where one is due; to be called after every step that reads one token.

        Args:
            state: that the row is in.
            row: which.
        """
        length = int(state.lengths[row])
        far = length - max(self._kept, default=0) >= EVERY  # a step of several tokens may have passed a multiple by
        if not self.on or (length % BLOCK and not far):
            return
        if self._passing is not None:
            self._kept.pop(self._passing, None)
        self._add(state.snapshot(row))
        self._passing = None if far or length % EVERY == 0 else length

    def stops(self, start: int, end: int, more: Iterable[int] = ()) -> list[int]:
        """Where a reading of tokens from ``start`` to ``end`` is to pause for a snapshot, ``more`` among them."""
        if not self.on:
            return []
        last = (end - 1) // BLOCK * BLOCK
        due = {*range(start // EVERY * EVERY + EVERY, end, EVERY), last, *more}
        return sorted(length for length in due if start < length < end)

    def rewind(self, state: State, length: int) -> int:
        """Make a row one of at most so many tokens, as many as it still can.

        Args:
            state: of one row, whose trail this is.
            length: at most as many tokens as it holds.

        Returns:
            How many tokens it holds then.
        """
        if length > 0 and length < state.earliest[0]:
            found = max((n for n in self._kept if n <= length), default=0)
            if found:
                state.restore(self._kept[found])
            else:
                state.rewind(0)
        else:
            state.rewind(length)
        left = int(state.lengths[0])
        self._kept = {n: snapshot for n, snapshot in self._kept.items() if n <= left}
        return left

    def snapshots(self) -> list[Snapshot]:
        """All of them, the shortest first."""
        return list(self._kept.values())

    def adopt(self, snapshots: Iterable[Snapshot]) -> None:
        """Take over snapshots that were made of the same text elsewhere."""
        if self.on:
            for snapshot in snapshots:
                self._add(snapshot)

    def _add(self, snapshot: Snapshot) -> None:
        self._kept[snapshot.length] = snapshot
        self._kept = dict(sorted(self._kept.items()))
        while len(self._kept) > self._most:
            lengths = [0, *self._kept]
            gaps = [lengths[i + 1] - lengths[i - 1] for i in range(1, len(lengths) - 1)]
            del self._kept[lengths[1 + gaps.index(min(gaps))] if gaps else lengths[1]]  # never the last one


def read_text(
    session: Session, tokens: Sequence[int], state: State, trail: Trail | None = None,
    *, stops: Sequence[int] = (), progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Read a row's tokens, with snapshots on the way.

    Args:
        session: steps the model.
        tokens: at least one.
        state: of one row; stepped in place.
        trail: takes the snapshots; None: nobody will.
        stops: lengths at which one is to be taken besides those that are due.
        progress: told between two pieces of a long text how many of how many tokens have been read.

    Returns:
        Logits (1, 1, vocab) after the last token; the next step may overwrite them.
    """
    start, at = int(state.lengths[0]), 0
    row = np.array([tokens], dtype=np.int64)
    for stop in [] if trail is None else trail.stops(start, start + len(tokens), stops):
        end = stop - start
        session.step(row[:, at:end], state, logits="none", progress=_from(progress, at, len(tokens)))
        assert trail is not None
        trail.mark(state)
        at = end
    logits = session.step(row[:, at:], state, progress=_from(progress, at, len(tokens)))
    if trail is not None:
        trail.mark(state)  # what follows a prompt is what is taken back most often
    return logits


def _from(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    """The progress of a part, told as that of all."""
    return None if progress is None else lambda read, _: progress(before + read, total)
