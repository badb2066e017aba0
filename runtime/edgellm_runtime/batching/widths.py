"""Rows whose sources have unequal lengths in one batch: those of fewer tokens are padded as the model's encoder pads.

What stands behind a row's own source is taken from what the encoder made of a source of one token, in as much room: it
alone knows how it marks what is none.
"""

from __future__ import annotations

from edgellm_runtime.session import Session
from edgellm_runtime.spec import SOURCE
from edgellm_runtime.state import State

__all__ = ["Widths", "width_of"]

_ROUND = 32  # tokens: a batch that grows by less would be copied with every source that is a little longer


def width_of(state: State) -> int | None:
    """The tokens of a state's sources, padding among them; None where its model answers none."""
    return next((spec.source for spec in state.specs if spec.encoded), None)


class Widths:
    """Widens rows.

    Args:
        session: whose.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._padding: State | None = None  # a row of one token and padding, as wide as was last asked for

    def rounded(self, width: int | None) -> int | None:
        """A width that has room for sources a little longer, too."""
        encoder = self._session.encoder
        if width is None or encoder is None:
            return None
        return min(-(-width // _ROUND) * _ROUND, encoder.max_source)

    def memory(self, rows: int, capacity: int, width: int | None) -> State:
        """Memory for rows that are put there.

        Args:
            rows: how many.
            capacity: tokens that each is expected to hold.
            width: of each; None where the model answers no sources.
        """
        session = self._session
        if width is None:
            return session.new_state(rows, capacity)
        slots = session.storage.rounded(min(max(capacity, 1), session.max_context))
        return State(session.signature.state, rows, slots, session.storage, width)

    def widened(self, row: State, width: int | None) -> State:
        """A row with room for a source of so many tokens; the very row where it has that.

        Args:
            row: a state of one row.
            width: at least its own.
        """
        own = width_of(row)
        if own is None or width is None or own == width:
            return row
        if self._padding is None or width_of(self._padding) != width:
            self._padding = self._session.padding(width)
        wide, storage = self._padding.fork(row.capacity), row.storage
        for spec, before in zip(wide.specs, row.specs, strict=True):
            tensor, given = wide.tensors[spec.name], row.tensors[spec.name]
            if not spec.encoded:
                storage.put(spec, tensor, 0, given, (wide.capacity, row.capacity))
                continue
            array = storage.read(spec, tensor).copy()
            array[(*[slice(None)] * spec.shape.index(SOURCE), slice(own))] = storage.read(before, given)
            storage.write(spec, tensor, array)
        wide.lengths = row.lengths.copy()
        return wide
