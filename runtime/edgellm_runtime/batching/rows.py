"""The rows of a batch that runs: each joins with what reading its prompt left, and leaves when its answer has ended.

Three ways to hold them. In this process's memory rows lie one after another, and a step takes the first of them, so
that who joins or leaves is the only row that is copied. Elsewhere the batch is copied then. And rows that must get the
very bits that they get alone are never put together. Rows that answer sources are all as wide as the longest of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgellm_runtime.batching.widths import Widths, width_of
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import HostStorage

__all__ = ["ApartRows", "CopiedRows", "Rows", "SharedRows", "joined", "rows_for"]

_VIEWED = 4  # times as many rows as there may be have arrays bound to them, which save the time of binding


class Rows(Protocol):
    """Rows in an order. One that leaves has its place taken by the last."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that their states take."""
        ...

    def add(self, row: State, room: int) -> None:
        """Put a row behind the last one.

        Args:
            row: a state of one row; not used again by its owner.
            room: the most tokens that it will hold.
        """
        ...

    def take(self, at: int) -> State:
        """A copy of a row."""
        ...

    def remove(self, at: int) -> None:
        """Let a row go."""
        ...

    def clear(self) -> None:
        """Let all rows go."""
        ...

    def parts(self) -> Sequence[State]:
        """States to step, which have all rows in order, each with room for one token more."""
        ...


def rows_for(session: Session, most: int, *, exact: bool) -> Rows:
    """What holds the rows of a session.

    Args:
        session: steps them.
        most: how many there will be at most.
        exact: whether each must get the very bits that it gets alone.
    """
    if exact:
        return ApartRows(session)
    return SharedRows(session, most) if isinstance(session.storage, HostStorage) else CopiedRows(session)


def joined(states: Sequence[State], widths: Widths) -> State:
    """One state with the rows of several, in order.

    Args:
        states: at least one, of one model.
        widths: makes rows as wide as the widest.
    """
    first = states[0]
    capacity = max(state.capacity for state in states)
    width = max(width_of(state) or 0 for state in states) or None
    whole = State(first.declared, sum(state.batch for state in states), capacity, first.storage, width)
    at = 0
    for state in states:
        for row in range(state.batch):
            whole.put(at, widths.widened(state if state.batch == 1 else state.take([row]), width))
            at += 1
    return whole


class SharedRows:
    """Follows :class:`Rows`, in this process's memory.

    Args:
        session: steps them.
        most: rows. Memory for all is asked for at once; the system gives it as it is written.
    """

    def __init__(self, session: Session, most: int) -> None:
        self._session, self._most, self._widths = session, most, Widths(session)
        self._rooms: list[int] = []
        self._whole: State | None = None
        self._view: State | None = None  # the rows that are there, while nobody joins or leaves
        self._views: dict[int, State] = {}  # by their number, for when there are as many again

    def __len__(self) -> int:
        """See :class:`Rows`."""
        return len(self._rooms)

    @property
    def nbytes(self) -> int:
        """See :class:`Rows`."""
        return 0 if self._whole is None else self._whole.nbytes

    def add(self, row: State, room: int) -> None:
        """See :class:`Rows`."""
        self._rooms.append(room)
        whole = self._settled(int(row.lengths[0]) + 1, self._widths.rounded(width_of(row)))
        whole.put(len(self._rooms) - 1, self._widths.widened(row, width_of(whole)))

    def take(self, at: int) -> State:
        """See :class:`Rows`."""
        return self._settled(0).take([at])

    def remove(self, at: int) -> None:
        """See :class:`Rows`."""
        whole, last = self._settled(0), len(self._rooms) - 1
        if at != last:
            whole.put(at, whole.take([last]))
            self._rooms[at] = self._rooms[last]
        self._rooms.pop()
        if not self._rooms:
            self.clear()

    def clear(self) -> None:
        """See :class:`Rows`."""
        self._rooms.clear()
        self._views.clear()
        self._whole = self._view = None

    def parts(self) -> Sequence[State]:
        """See :class:`Rows`."""
        if not self._rooms:
            return ()
        if self._view is not None and int(self._view.lengths.max()) < self._view.capacity:
            return (self._view,)
        whole = self._settled(0)
        rows = len(self._rooms)
        whole = self._settled(int(whole.lengths[:rows].max()) + 1)
        self._view = self._first(whole, rows)
        return (self._view,)

    def _first(self, whole: State, rows: int) -> State:
        """The rows' memory as a state, the one that they had when they were as many: to bind it takes milliseconds."""
        found = self._views.pop(rows, None)
        if found is None:
            found = whole.first(rows)
            while self._views and sum(self._views) + rows > _VIEWED * self._most:  # each has logits of its own
                self._views.pop(next(iter(self._views)))
        else:
            whole.follow(found)
        self._views[rows] = found
        return found

    def _settled(self, slots: int, width: int | None = None) -> State:
        """All rows' memory, with so many slots and so wide at least, and no view of it in use."""
        whole = self._whole
        if whole is not None and self._view is not None:
            whole.settle(self._view)
        self._view = None
        wide = None if whole is None else width_of(whole)
        if whole is None or whole.capacity < slots or (wide or 0) < (width or 0):
            self._whole = whole = self._grown(whole, slots, max(wide or 0, width or 0) or None)
            self._views.clear()
        return whole

    def _grown(self, old: State | None, slots: int, width: int | None) -> State:
        """By half and more, since all rows are copied; but never beyond what any of them will need."""
        ample = slots if old is None else max(slots, min(old.capacity * 3 // 2, max(self._rooms)))
        new = self._widths.memory(self._most, ample, width)
        for row in range(0 if old is None else len(self._rooms)):
            if old is not None and old.lengths[row]:
                new.put(row, self._widths.widened(old.take([row]), width))
        return new


class CopiedRows:
    """Follows :class:`Rows`, on any device.

    Args:
        session: steps them.
    """

    def __init__(self, session: Session) -> None:
        self._widths = Widths(session)
        self._batch: State | None = None

    def __len__(self) -> int:
        """See :class:`Rows`."""
        return 0 if self._batch is None else self._batch.batch

    @property
    def nbytes(self) -> int:
        """See :class:`Rows`."""
        return 0 if self._batch is None else self._batch.nbytes

    def add(self, row: State, room: int) -> None:
        """See :class:`Rows`."""
        self._batch = row if self._batch is None else joined([self._batch, row], self._widths)

    def take(self, at: int) -> State:
        """See :class:`Rows`."""
        assert self._batch is not None
        return self._batch.take([at])

    def remove(self, at: int) -> None:
        """See :class:`Rows`."""
        assert self._batch is not None
        kept = list(range(self._batch.batch))
        kept[at] = kept[-1]
        self._batch = self._batch.take(kept[:-1]) if len(kept) > 1 else None

    def clear(self) -> None:
        """See :class:`Rows`."""
        self._batch = None

    def parts(self) -> Sequence[State]:
        """See :class:`Rows`; the session makes room by itself."""
        return () if self._batch is None else (self._batch,)


class ApartRows:
    """Follows :class:`Rows`; each row is stepped alone.

    Args:
        session: steps them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._states: list[State] = []

    def __len__(self) -> int:
        """See :class:`Rows`."""
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """See :class:`Rows`."""
        return sum(state.nbytes for state in self._states)

    def add(self, row: State, room: int) -> None:
        """See :class:`Rows`."""
        self._states.append(row)

    def take(self, at: int) -> State:
        """See :class:`Rows`."""
        return self._states[at].fork()

    def remove(self, at: int) -> None:
        """See :class:`Rows`."""
        self._states[at] = self._states[-1]
        self._states.pop()

    def clear(self) -> None:
        """See :class:`Rows`."""
        self._states.clear()

    def parts(self) -> Sequence[State]:
        """See :class:`Rows`."""
        return self._states
