"""The carried state: allocated from the manifest, stepped in place, forked, rewound, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import StateError
from edgellm_runtime.spec import StateSpec

__all__ = ["State"]

Array = NDArray[Any]
_GROWTH = 64  # slots are added in multiples of this, so that a long chat grows its cache seldom
_FORMAT = 1


class State:
    """What a model remembers of the rows it has read.

    Args:
        specs: from the bundle's manifest.
        batch: rows.
        capacity: slots for tokens in each row; grows when more are needed.
    """

    def __init__(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise StateError(f"a state needs at least one row and one slot, not {batch} and {capacity}")
        self.specs = tuple(specs)
        self.batch, self.capacity = batch, capacity
        self.lengths: NDArray[np.int32] = np.zeros(batch, dtype=np.int32)
        self.tensors = {s.name: _zeros(s, batch, capacity) for s in specs}
        # A step writes what replaces a state beside it, and the two change places.
        self.spares = {s.name: np.zeros_like(self.tensors[s.name]) for s in specs if s.update == "replace"}
        self.attachments: dict[Any, Any] = {}  # what a backend keeps for these very arrays; goes when they go

    @property
    def nbytes(self) -> int:
        """Bytes that all its arrays take."""
        return sum(a.nbytes for a in (*self.tensors.values(), *self.spares.values()))

    def reserve(self, slots: int) -> None:
        """Make room for that many tokens in each row; what is there stays."""
        if slots <= self.capacity:
            return
        capacity = -(-slots // _GROWTH) * _GROWTH
        grown = {s.name: _zeros(s, self.batch, capacity) for s in self.specs if s.capacity_axis is not None}
        for name, new in grown.items():
            old = self.tensors[name]
            new[tuple(slice(0, n) for n in old.shape)] = old
            self.tensors[name] = new
        self.capacity = capacity
        self.attachments.clear()

    def swap(self) -> None:
        """Put what the last step wrote in the place of what it read."""
        for name, spare in self.spares.items():
            self.tensors[name], self.spares[name] = spare, self.tensors[name]

    def fork(self) -> State:
        """A copy that goes its own way, such as for another continuation of one prompt."""
        return self.take(range(self.batch))

    def take(self, rows: Sequence[int]) -> State:
        """A copy of some rows, in the order given; a row may be taken more than once.

        Raises:
            StateError: a row that is not there.
        """
        if not len(rows) or not all(0 <= row < self.batch for row in rows):
            raise StateError(f"rows {list(rows)} of a state of {self.batch} rows; name rows from 0 to {self.batch - 1}")
        index = list(rows)
        copy = State.__new__(State)
        copy.specs, copy.batch, copy.capacity, copy.attachments = self.specs, len(index), self.capacity, {}
        copy.lengths = self.lengths[index].copy()
        copy.tensors = {name: a[index] for name, a in self.tensors.items()}
        copy.spares = {name: a[index] for name, a in self.spares.items()}
        return copy

    def put(self, row: int, other: State) -> None:
        """Copy a state of one row into a row of this one, which has room for it."""
        self.reserve(int(other.lengths[0]))
        for spec in self.specs:
            source, axis = other.tensors[spec.name][0], spec.capacity_axis
            slots = min(self.capacity, other.capacity)
            used = (slice(None),) * ((axis or 1) - 1) + (slice(0, slots),) if axis is not None else ()
            self.tensors[spec.name][row][used] = source[used]
        self.lengths[row] = other.lengths[0]

    def rewind(self, lengths: Sequence[int] | int) -> None:
        """Forget the last tokens of each row.

        Args:
            lengths: how many tokens to keep in each row.

        Raises:
            StateError: the model has a recurrence, which cannot be run backwards, or a row holds fewer tokens.
        """
        wanted = np.asarray(lengths, dtype=np.int32)
        if wanted.shape not in ((), (self.batch,)):
            raise StateError(
                f"cannot rewind {self.batch} rows to {wanted.tolist()}; give one length, or one for each row"
            )
        wanted = np.broadcast_to(wanted, (self.batch,))
        if (wanted == self.lengths).all():
            return
        if (wanted < 0).any() or (wanted > self.lengths).any():
            raise StateError(f"cannot rewind rows of {self.lengths.tolist()} tokens to {wanted.tolist()}")
        if self.spares and wanted.any():
            raise StateError("a recurrent state cannot be rewound; fork() it before the tokens you may take back")
        for name in self.spares:  # nothing is kept: a recurrence starts anew
            self.tensors[name][...] = 0
        self.lengths = wanted.copy()

    def save(self, path: str | Path) -> None:
        """Write it to a file, only the slots in use."""
        used = max(int(self.lengths.max()), 1)
        arrays = {}
        for spec in self.specs:
            a, axis = self.tensors[spec.name], spec.capacity_axis
            arrays[spec.name] = a if axis is None else a[(slice(None),) * axis + (slice(0, used),)]
        header = json.dumps({"format": _FORMAT, "specs": [s.to_json() for s in self.specs]})
        with Path(path).open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, allow_pickle=False, __header__=np.array(header), __lengths__=self.lengths, **arrays)

    @classmethod
    def load(cls, path: str | Path, specs: Sequence[StateSpec]) -> State:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            specs: of the model that will go on from it.

        Raises:
            StateError: not such a file, or of another model.
        """
        import zipfile  # a tenth of this package's time to import, for what few programs do
        import zlib

        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                header = json.loads(str(data["__header__"]))
                if header["format"] != _FORMAT or header["specs"] != [s.to_json() for s in specs]:
                    raise StateError(f"{path}: the state of another model; read the prompt again with this one")
                lengths, arrays = data["__lengths__"], {spec.name: data[spec.name] for spec in specs}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StateError(f"{path}: not a saved state ({error}); read the prompt again") from error
        if lengths.dtype != np.int32 or lengths.ndim != 1 or not len(lengths) or lengths.min() < 0:
            raise StateError(f"{path}: its lengths are damaged; read the prompt again")
        state = cls(specs, len(lengths), max(int(lengths.max()), 1))
        state.lengths = lengths
        for spec in specs:
            found, expected = arrays[spec.name], state.tensors[spec.name]
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise StateError(
                    f"{path}: {spec.name} is {found.dtype} {found.shape}, not {spec.dtype} {expected.shape}"
                )
            expected[...] = found
        return state


def _zeros(spec: StateSpec, batch: int, capacity: int) -> Array:
    try:
        return np.zeros(spec.resolve(batch, capacity), dtype=spec.dtype)
    except (MemoryError, ValueError, TypeError) as error:  # numpy's three ways to say: too large, or no such type
        gigabytes = spec.nbytes(batch, capacity) / 1e9
        raise StateError(
            f"{spec.name} for {batch} rows of {capacity} tokens, {gigabytes:.1f} GB of {spec.dtype}, cannot be made "
            f"({error}); ask for fewer rows or tokens"
        ) from error
