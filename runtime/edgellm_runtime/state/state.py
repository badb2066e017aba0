"""The carried state: allocated from the manifest, stepped in place, forked, rewound, saved and loaded.

Where its tensors live is its storage's business; see :mod:`edgellm_runtime.state.storage`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import (
    check_instance,
    check_integer,
    check_integers,
    check_list,
    check_path,
    check_text,
    shown,
)
from edgellm_runtime.errors import StateError
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.array_file import write_arrays
from edgellm_runtime.state.saved_arrays import header_of, read_saved
from edgellm_runtime.state.snapshot import Snapshot, overwritten, packed
from edgellm_runtime.state.storage import HOST, Buffers, HostStorage, Origin, Storage, widened

__all__ = ["State"]

Array = NDArray[Any]
_COUNTABLE = 1 << 62  # rows or slots: NumPy counts no further


class State:
    """What a model remembers of the rows it has read.

    Args:
        specs: from the bundle's manifest.
        batch: rows.
        capacity: slots for tokens in each row; grows when more are needed.
        storage: where the tensors are; this process's memory unless a backend says otherwise.
        source: the tokens of the longest source, where an encoder makes some of them.
    """

    def __init__(
        self, specs: Sequence[StateSpec], batch: int, capacity: int, storage: Storage = HOST, source: int | None = None
    ) -> None:
        batch = check_integer("batch", batch, None, _COUNTABLE)
        capacity = check_integer("capacity", capacity, None, _COUNTABLE)
        specs = check_list("specs", specs, "StateSpecs", _check_spec)
        if batch < 1 or capacity < 1:
            raise StateError(f"a state needs at least one row and one slot, not {batch} and {capacity}")
        sized = tuple(spec.of_source(source) for spec in specs)
        buffers = storage.acquire(sized, batch, capacity)
        empty = np.zeros(batch, dtype=np.int32)
        self._set(sized, tuple(specs), batch, capacity, storage, buffers, empty, empty)

    def _set(
        self, specs: tuple[StateSpec, ...], declared: tuple[StateSpec, ...], batch: int, capacity: int,
        storage: Storage, buffers: Buffers, lengths: NDArray[np.int32], written: NDArray[np.int32],
    ) -> None:  # fmt: skip
        self.specs, self.batch, self.capacity = specs, batch, capacity
        self.declared = declared  # the specs as the model has them, for sources of any length
        self.storage, self.buffers, self.lengths = storage, buffers, lengths.copy()
        self.about: dict[str, Any] = {}  # of a loaded one, what was written beside it; believed by nobody yet
        self.snapshots: tuple[Snapshot, ...] = ()  # likewise, in form what they must be
        self._written = written.copy()  # what rows held before they were last rewound

    @property
    def tensors(self) -> dict[str, Any]:
        """What the next step reads, by state name; the storage's own."""
        return self.buffers.tensors

    @property
    def spares(self) -> dict[str, Any]:
        """Where a step writes what is not written in place; the two change places after it."""
        return self.buffers.spares

    @property
    def attachments(self) -> dict[Any, Any]:
        """What a backend keeps for these very tensors; goes when they go."""
        return self.buffers.attachments

    @property
    def nbytes(self) -> int:
        """Bytes that all its tensors take."""
        each = {spec.name: spec.nbytes(self.batch, self.capacity) for spec in self.specs}
        return sum(each.values()) + sum(each[name] for name in self.spares)

    @property
    def written(self) -> NDArray[np.int32]:
        """The most tokens that each row has held since it was empty, (batch,): what its rings were written with."""
        return np.maximum(self._written, self.lengths)

    @property
    def earliest(self) -> NDArray[np.int32]:
        """The fewest tokens, above none, that each row can be rewound to, (batch,); it can always be made empty."""
        rows = [max((s.earliest(n) for s in self.specs), default=0) for n in self.written.tolist()]
        return np.array(rows, dtype=np.int32)

    def read(self, name: str) -> Array:
        """One tensor's numbers, in this process's memory; bfloat16 as float32."""
        check_text("name", name)
        spec = next((s for s in self.specs if s.name == name), None)
        if spec is None:
            raise StateError(f"the state has no tensor {shown(name)}; it has {', '.join(s.name for s in self.specs)}")
        return widened(self.storage.read(spec, self.tensors[name]), spec.dtype)

    def reserve(self, slots: int) -> None:
        """Make room for that many tokens in each row; what is there stays."""
        slots = check_integer("slots", slots, 0, _COUNTABLE)
        if slots <= self.capacity:
            return
        capacity = self.storage.rounded(slots)
        self.buffers = self._grown(capacity)
        self.capacity = capacity

    def _grown(self, capacity: int) -> Buffers:
        self._touch(int(self.lengths.min()))
        return self.storage.grown(self.specs, self.buffers, self.batch, capacity)

    def _touch(self, slots: int) -> None:
        """Note that slots from so many on may have been written to, or will be."""
        if (origin := self.buffers.origin) is not None:
            self.buffers.origin = origin.below(slots)

    def swap(self) -> None:
        """Put what the last step wrote in the place of what it read."""
        tensors, spares = self.tensors, self.spares
        for name, spare in spares.items():
            tensors[name], spares[name] = spare, tensors[name]

    def fork(self, room: int = 0) -> State:
        """A copy that goes its own way, such as for another continuation of one prompt.

        Args:
            room: slots for tokens that each row of it has at least.
        """
        room = check_integer("room", room, 0, _COUNTABLE)
        larger = room > self.capacity
        if not isinstance(self.storage, HostStorage) or not (larger or self.buffers.origin):
            copy = self.take(range(self.batch))
            copy.reserve(room)
            return copy
        copy, capacity = State.__new__(State), self.storage.rounded(room) if larger else self.capacity
        new = self._grown(capacity)  # what grows is copied once, not twice, and what is a file's not at all
        tensors = {name: a.copy() if a is self.tensors[name] else a for name, a in new.tensors.items()}
        buffers = Buffers(tensors, {name: a.copy() for name, a in new.spares.items()}, origin=new.origin)
        copy._set(self.specs, self.declared, self.batch, capacity, self.storage, buffers, self.lengths, self._written)
        return copy

    def take(self, rows: Sequence[int]) -> State:
        """A copy of some rows, in the order given; a row may be taken more than once.

        Raises:
            StateError: a row that is not there.
        """
        rows = check_list("rows", rows, "row numbers", check_integer)
        if not len(rows) or not all(0 <= row < self.batch for row in rows):
            raise StateError(f"rows {list(rows)} of a state of {self.batch} rows; name rows from 0 to {self.batch - 1}")
        index, copy = list(rows), State.__new__(State)
        buffers = self.storage.taken(self.specs, self.buffers, index, self.capacity)
        kept = self.lengths[index], self._written[index]
        copy._set(self.specs, self.declared, len(index), self.capacity, self.storage, buffers, *kept)
        return copy

    def first(self, rows: int) -> State:
        """The first rows as a state in the same memory, which must be this process's; :meth:`settle` ends that.

        Until then only one of the two may be used.

        Args:
            rows: how many.
        """
        self._touch(0)  # by whoever has the view
        view = State.__new__(State)
        tensors, spares = ({name: a[:rows] for name, a in each.items()} for each in (self.tensors, self.spares))
        kept = self.lengths[:rows], self._written[:rows]
        view._set(self.specs, self.declared, rows, self.capacity, self.storage, Buffers(tensors, spares), *kept)
        return view

    def settle(self, view: State) -> None:
        """Take over what steps of :meth:`first`'s rows have changed besides the numbers in their memory."""
        self.lengths[: view.batch], self._written[: view.batch] = view.lengths, view.written
        for name, spare in self.spares.items():
            if spare.ctypes.data == view.tensors[name].ctypes.data:  # an odd number of steps
                self.tensors[name], self.spares[name] = spare, self.tensors[name]

    def follow(self, view: State) -> None:
        """Let a state that :meth:`first` gave be used again, once it was settled, if this one has not grown since."""
        view.lengths, view._written = self.lengths[: view.batch].copy(), self._written[: view.batch].copy()
        for name, spare in view.spares.items():
            if spare.ctypes.data == self.tensors[name].ctypes.data:  # see settle
                view.tensors[name], view.spares[name] = spare, view.tensors[name]

    def put(self, row: int, other: State) -> None:
        """Copy a state of one row into a row of this one, which has room for it.

        Raises:
            StateError: a row that is not there, or a state of another model or of several rows.
        """
        row = check_integer("row", row)
        check_instance("other", other, State, "take() gives one of a row")
        if not 0 <= row < self.batch or other.batch != 1 or other.specs != self.specs:
            raise StateError(
                f"cannot put a state of {other.batch} rows into row {shown(row)} of {self.batch}; it must be one row "
                "of the same model's, and the row must be there"
            )
        self.reserve(int(other.lengths[0]))
        self._touch(0)
        for spec in self.specs:
            capacities = self.capacity, other.capacity
            self.storage.put(spec, self.tensors[spec.name], row, other.tensors[spec.name], capacities)
        self.lengths[row], self._written[row] = other.lengths[0], other.written[0]

    def rewind(self, lengths: Sequence[int] | int) -> None:
        """Forget the last tokens of each row.

        A row can always be made empty, or kept as it is. Between these it depends on the model's states: what is
        appended to, and what is static, lets every token be taken back; a recurrence none. A ring lets every token be
        taken back while none has been overwritten. Once it is full, it has lost the oldest: so many of the last tokens
        can be taken back as it has slots beyond its window, and one more, counted from the longest that the row has
        been since it was empty. :attr:`earliest` says it in numbers.

        Args:
            lengths: how many tokens to keep in each row.

        Raises:
            StateError: a state no longer holds what a row was at that length, or a row holds fewer tokens. Nothing is
                changed then.
        """
        wanted = check_integers("lengths", lengths)
        if wanted.shape not in ((), (self.batch,)):
            raise StateError(
                f"cannot rewind {self.batch} rows to {shown(wanted.tolist())}; give one length, or one for each row"
            )
        wanted = np.broadcast_to(wanted, (self.batch,))
        if (wanted == self.lengths).all():
            return
        if (wanted < 0).any() or (wanted > self.lengths).any():
            raise StateError(f"cannot rewind rows of {self.lengths.tolist()} tokens to {wanted.tolist()}")
        written = self.written
        for row in np.flatnonzero((wanted != self.lengths) & (wanted > 0)):
            self._check_rewind(int(row), int(wanted[row]), int(written[row]))
        self._clear_replaced(wanted == 0)
        self._written = np.where(wanted == 0, 0, written).astype(np.int32)
        self._touch(int(wanted.min()))
        self.lengths = wanted.astype(np.int32)

    def snapshot(self, row: int | None = None) -> Snapshot:
        """What steps overwrite of a row, copied: its recurrences and rings.

        Args:
            row: which; None: the only one.

        Raises:
            StateError: it has several rows and none is named, or one that is not there.
        """
        if row is None and self.batch != 1:
            raise StateError(f"cannot take a snapshot of {self.batch} rows; name one of them")
        at = 0 if row is None else check_integer("row", row)
        if not 0 <= at < self.batch:
            raise StateError(f"row {shown(at)} of a state of {self.batch} rows; name one from 0 to {self.batch - 1}")
        if self.batch > 1 and not isinstance(self.storage, HostStorage):  # elsewhere a row is not to be looked at alone
            return self.take([at]).snapshot()
        read = {s.name: self.storage.read(s, self.tensors[s.name]) for s in overwritten(self.specs)}
        arrays = {name: (array if self.batch == 1 else array[at : at + 1]).copy() for name, array in read.items()}
        return Snapshot(int(self.lengths[at]), int(self.written[at]), arrays)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this very row, which since then has only read on.

        Args:
            snapshot: made by :meth:`snapshot`. Whether the row has read the same tokens up to there is for the caller
                to know: tensors do not tell.

        Raises:
            StateError: a state of several rows, a snapshot of another model, or one of more tokens than the row holds.
        """
        check_instance("snapshot", snapshot, Snapshot, "snapshot() takes one")
        if self.batch != 1 or snapshot.arrays.keys() != {s.name for s in overwritten(self.specs)}:
            raise StateError("the snapshot is not of this state; restore one that snapshot() took of it")
        if snapshot.length > self.lengths[0]:
            raise StateError(
                f"cannot go back to {snapshot.length} tokens in a row of {self.lengths[0]}; take a snapshot after them"
            )
        for spec in overwritten(self.specs):
            self.storage.write(spec, self.tensors[spec.name], snapshot.arrays[spec.name])
        self.lengths[0], self._written[0] = snapshot.length, snapshot.written

    def _check_rewind(self, row: int, wanted: int, written: int) -> None:
        spec = max(self.specs, key=lambda s: s.earliest(written), default=None)
        if spec is None or wanted >= spec.earliest(written):
            return
        if spec.update == "replace":
            raise StateError(
                "a recurrent state cannot be rewound; fork() it, or take a snapshot(), before what you may take back"
            )
        raise StateError(
            f"row {row} of {self.lengths[row]} tokens cannot be rewound to {wanted}: {spec.name}, a ring, has "
            f"overwritten what it held then, and goes back to {spec.earliest(written)}; rewind to 0 and read the row "
            "again, or fork() the state before the tokens you may take back"
        )

    def _clear_replaced(self, rows: NDArray[np.bool_]) -> None:
        """Let recurrences of some rows start anew; what else they carry is not looked at in an empty row."""
        replaced = [spec for spec in self.specs if spec.update == "replace"]
        if rows.all():
            for spec in replaced:
                self.storage.clear(self.tensors[spec.name])
        elif replaced and rows.any():
            blank = self.storage.acquire(replaced, 1, self.capacity)
            for row, spec in itertools.product(np.flatnonzero(rows).tolist(), replaced):
                capacities = self.capacity, self.capacity
                self.storage.put(spec, self.tensors[spec.name], row, blank.tensors[spec.name], capacities)

    def save(
        self, path: str | Path, *, about: dict[str, Any] | None = None, snapshots: Sequence[Snapshot] = ()
    ) -> None:
        """Write it to a file, only the slots in use.

        Args:
            path: the file.
            about: what to write beside it, of JSON's types; a loaded state has it as ``about``.
            snapshots: of its only row, to write beside it too; a loaded state has them as ``snapshots``.

        Raises:
            OptionError: something that JSON has not.
            StateError: the file cannot be written.
        """
        path = check_path("path", path)
        used = max(int(self.lengths.max()), 1)
        arrays = {s.name: self.storage.read(s, self.tensors[s.name])[s.used(used)] for s in self.specs}
        slots = {s.name: axis for s in self.specs if (axis := s.capacity_axis) is not None}
        if _has_ring(self.specs):
            arrays["__written__"] = self.written
        arrays |= packed(check_list("snapshots", snapshots, "Snapshots", _check_snapshot))
        header = header_of(self.specs, {} if about is None else check_instance("about", about, dict, "of JSON's types"))
        try:
            write_arrays(path, {"__header__": np.array(header), "__lengths__": self.lengths, **arrays}, slots)
        except OSError as error:
            raise StateError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error

    @classmethod
    def load(
        cls, path: str | Path, specs: Sequence[StateSpec], storage: Storage = HOST, *, threads: int = 1
    ) -> State:  # fmt: skip
        """Read what :meth:`save` wrote.

        Where this process's memory is the storage, large tensors are the file's pages until they are written to.

        Args:
            path: the file.
            specs: of the model that will go on from it.
            storage: where its tensors will be.
            threads: that look at the file's checksums.

        Raises:
            StateError: not such a file, or of another model.
        """
        path, specs = check_path("path", path), check_list("specs", specs, "StateSpecs", _check_spec)
        saved = read_saved(path, specs, check_integer("threads", threads, 1))
        used = saved.used
        state = cls(specs, len(saved.lengths), storage.rounded(used), storage, saved.source)
        state.lengths, state._written = saved.lengths, saved.written
        state.about, state.snapshots = saved.about, saved.snapshots
        origin = Origin(saved.file, int(saved.lengths.min())) if isinstance(storage, HostStorage) else None
        for spec in specs:
            tensor = None if origin is None else origin.tensor(spec, state.batch, state.capacity)
            if tensor is None:
                storage.write(spec, state.tensors[spec.name], saved.file.arrays[spec.name][spec.used(used)])
            else:
                state.tensors[spec.name], state.buffers.origin = tensor, origin
        return state


def _check_spec(name: str, value: Any) -> StateSpec:
    return check_instance(name, value, StateSpec, "session.signature.state holds a model's")


def _check_snapshot(name: str, value: Any) -> Snapshot:
    return check_instance(name, value, Snapshot, "snapshot() takes one")


def _has_ring(specs: Sequence[StateSpec]) -> bool:
    return any(spec.update == "ring" for spec in specs)
