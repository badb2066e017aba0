"""The carried state: allocated from the manifest, stepped in place, forked, rewound, saved and loaded.

Where its tensors live is its storage's business; see :mod:`edgellm_runtime.state.storage`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import StateError
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.storage import HOST, Buffers, Storage, host_dtype, widened

__all__ = ["State"]

Array = NDArray[Any]
_FORMAT = 1


class State:
    """What a model remembers of the rows it has read.

    Args:
        specs: from the bundle's manifest.
        batch: rows.
        capacity: slots for tokens in each row; grows when more are needed.
        storage: where the tensors are; this process's memory unless a backend says otherwise.
    """

    def __init__(self, specs: Sequence[StateSpec], batch: int, capacity: int, storage: Storage = HOST) -> None:
        if batch < 1 or capacity < 1:
            raise StateError(f"a state needs at least one row and one slot, not {batch} and {capacity}")
        buffers = storage.acquire(tuple(specs), batch, capacity)
        self._set(tuple(specs), batch, capacity, storage, buffers, np.zeros(batch, dtype=np.int32))

    def _set(
        self, specs: tuple[StateSpec, ...], batch: int, capacity: int, storage: Storage, buffers: Buffers,
        lengths: NDArray[np.int32],
    ) -> None:  # fmt: skip
        self.specs, self.batch, self.capacity = specs, batch, capacity
        self.storage, self.buffers, self.lengths = storage, buffers, lengths

    @property
    def tensors(self) -> dict[str, Any]:
        """What the next step reads, by state name; the storage's own."""
        return self.buffers.tensors

    @property
    def spares(self) -> dict[str, Any]:
        """Where a step writes what replaces a state; the two change places after it."""
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

    def read(self, name: str) -> Array:
        """One tensor's numbers, in this process's memory; bfloat16 as float32."""
        spec = next(s for s in self.specs if s.name == name)
        return widened(self.storage.read(spec, self.tensors[name]), spec.dtype)

    def reserve(self, slots: int) -> None:
        """Make room for that many tokens in each row; what is there stays."""
        if slots <= self.capacity:
            return
        capacity = self.storage.rounded(slots)
        self.buffers = self.storage.grown(self.specs, self.buffers, self.batch, capacity)
        self.capacity = capacity

    def swap(self) -> None:
        """Put what the last step wrote in the place of what it read."""
        tensors, spares = self.tensors, self.spares
        for name, spare in spares.items():
            tensors[name], spares[name] = spare, tensors[name]

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
        index, copy = list(rows), State.__new__(State)
        buffers = self.storage.taken(self.specs, self.buffers, index, self.capacity)
        copy._set(self.specs, len(index), self.capacity, self.storage, buffers, self.lengths[index].copy())
        return copy

    def put(self, row: int, other: State) -> None:
        """Copy a state of one row into a row of this one, which has room for it."""
        self.reserve(int(other.lengths[0]))
        for spec in self.specs:
            capacities = self.capacity, other.capacity
            self.storage.put(spec, self.tensors[spec.name], row, other.tensors[spec.name], capacities)
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
            self.storage.clear(self.tensors[name])
        self.lengths = wanted.copy()

    def save(self, path: str | Path) -> None:
        """Write it to a file, only the slots in use."""
        used = max(int(self.lengths.max()), 1)
        arrays = {}
        for spec in self.specs:
            a, axis = self.storage.read(spec, self.tensors[spec.name]), spec.capacity_axis
            arrays[spec.name] = a if axis is None else a[(slice(None),) * axis + (slice(0, used),)]
        header = json.dumps({"format": _FORMAT, "specs": [s.to_json() for s in self.specs]})
        with Path(path).open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, allow_pickle=False, __header__=np.array(header), __lengths__=self.lengths, **arrays)

    @classmethod
    def load(cls, path: str | Path, specs: Sequence[StateSpec], storage: Storage = HOST) -> State:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            specs: of the model that will go on from it.
            storage: where its tensors will be.

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
        used = max(int(lengths.max()), 1)
        for spec in specs:
            found, expected = arrays[spec.name], spec.resolve(len(lengths), used)
            if found.shape != expected or found.dtype != host_dtype(spec.dtype):
                raise StateError(f"{path}: {spec.name} is {found.dtype} {found.shape}, not {spec.dtype} {expected}")
        state = cls(specs, len(lengths), storage.rounded(used), storage)
        state.lengths = lengths
        for spec in specs:
            storage.write(spec, state.tensors[spec.name], arrays[spec.name])
        return state
