"""Where a state's tensors live: in this process's memory, or on a device that keeps them from step to step.

A :class:`~edgellm_runtime.state.State` knows rows, slots and rules; a storage knows memory. Nothing here steps a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import StateError
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.array_file import ArrayFile
from edgellm_runtime.state.file_pages import PAGE

__all__ = [
    "GROWTH",
    "HOST",
    "Buffers",
    "HostStorage",
    "Origin",
    "Storage",
    "host_dtype",
    "narrowed",
    "too_large",
    "widened",
]

Array = NDArray[Any]
_LINE = 64  # bytes
GROWTH = 64  # slots are added in multiples of this, so that a long chat grows its cache seldom


@dataclass(eq=False)
class Buffers:
    """The memory of one state.

    Args:
        tensors: what a step reads, by state name.
        spares: where it writes what it does not write in place; the two change places after the step.
        attachments: what a backend keeps for these very buffers, such as bindings; it goes when they go.
        origin: the file that some of the tensors begin with.
    """

    tensors: dict[str, Any]
    spares: dict[str, Any]
    attachments: dict[Any, Any] = field(default_factory=dict)
    origin: Origin | None = None


@dataclass(frozen=True, eq=False)
class Origin:
    """A file that tensors in this process's memory begin with; another state's may begin with it, too.

    Args:
        file: with the arrays, by state name.
        slots: how many of each row nothing was written to since.
    """

    file: ArrayFile
    slots: int

    def below(self, slots: int) -> Origin | None:
        """What is left of it where those from ``slots`` on may have been written to; None: nothing."""
        return self if slots >= self.slots else replace(self, slots=slots) if slots else None

    def tensor(self, spec: StateSpec, batch: int, capacity: int) -> Array | None:
        """A tensor of its own that begins with the file's slots; None where that must be copied.

        Args:
            spec: of a state that is appended to.
            batch: rows.
            capacity: slots.
        """
        axis, array, pages = spec.capacity_axis, self.file.arrays[spec.name], self.file.pages
        shape, start = spec.resolve(batch, capacity), self.file.starts[spec.name]
        if axis is None or pages is None or not array.flags.c_contiguous:
            return None
        if not self.slots <= array.shape[axis] <= min(capacity, 2 * self.slots):  # little of it would be left as it is
            return None
        slot = math.prod(shape[axis + 1 :]) * array.itemsize
        size, stride = array.shape[axis] * slot, capacity * slot
        if start % PAGE or size % PAGE or stride % PAGE or not size:
            return None
        memory = pages.under(start, size, math.prod(shape[:axis]), stride)
        return None if memory is None else memory.view(array.dtype).reshape(shape)


class Storage(Protocol):
    """Makes and moves buffers. Tensors are its own: a caller hands them back and looks inside only with ``read``."""

    def rounded(self, slots: int) -> int:
        """The capacity to make when so many slots are needed."""
        ...

    def acquire(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> Buffers:
        """Buffers of zeros.

        Raises:
            StateError: they do not fit into memory.
        """
        ...

    def grown(self, specs: Sequence[StateSpec], old: Buffers, batch: int, capacity: int) -> Buffers:
        """Larger buffers that begin with what the old ones hold."""
        ...

    def taken(self, specs: Sequence[StateSpec], old: Buffers, rows: Sequence[int], capacity: int) -> Buffers:
        """Copies of some rows, in the order given."""
        ...

    def put(self, spec: StateSpec, target: Any, row: int, source: Any, capacities: tuple[int, int]) -> None:
        """Copy a tensor of one row into a row of another, as many slots as both have.

        Args:
            spec: of both.
            target: written in place.
            row: of the target.
            source: of one row.
            capacities: the target's and the source's.
        """
        ...

    def clear(self, tensor: Any) -> None:
        """Make it zeros."""
        ...

    def read(self, spec: StateSpec, tensor: Any) -> Array:
        """Its numbers in this process's memory, as :func:`host_dtype` says; a view where they are there already."""
        ...

    def write(self, spec: StateSpec, tensor: Any, array: Array) -> None:
        """Fill it with numbers as :meth:`read` gives them; those of fewer slots fill the first ones."""
        ...


def host_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype for one of ours; bfloat16, which it lacks, is held as the 16 bits that it is."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def widened(array: Array, dtype: str) -> Array:
    """Numbers that NumPy can compute with: the bits of bfloat16 become float32, anything else stays as it is."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrowed(array: Array, dtype: str) -> Array:
    """The other way round: float32 to the bits of the nearest bfloat16, ties to even."""
    if dtype != "bfloat16":
        return array.astype(host_dtype(dtype), copy=False)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def too_large(spec: StateSpec, batch: int, capacity: int, reason: object, where: str = "") -> StateError:
    """The error of a state that memory does not hold."""
    gigabytes = spec.nbytes(batch, capacity) / 1e9
    return StateError(
        f"{spec.name} for {batch} rows of {capacity} tokens, {gigabytes:.1f} GB of {spec.dtype}, cannot be made"
        f"{where} ({reason}); ask for fewer rows or tokens"
    )


class HostStorage:
    """NumPy arrays; follows :class:`Storage`."""

    def rounded(self, slots: int) -> int:
        """See :meth:`Storage.rounded`."""
        return 1 if slots <= 1 else -(-slots // GROWTH) * GROWTH

    def acquire(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> Buffers:
        """See :meth:`Storage.acquire`."""
        tensors = {s.name: _zeros(s, batch, capacity) for s in specs}
        return Buffers(tensors, {s.name: np.zeros_like(tensors[s.name]) for s in specs if not s.in_place})

    def grown(self, specs: Sequence[StateSpec], old: Buffers, batch: int, capacity: int) -> Buffers:
        """See :meth:`Storage.grown`."""
        tensors = {}
        for spec in specs:
            if (axis := spec.capacity_axis) is None:
                continue
            was = old.tensors[spec.name]
            begun = None if old.origin is None else old.origin.tensor(spec, batch, capacity)
            new = _zeros(spec, batch, capacity) if begun is None else begun
            start = 0 if begun is None or old.origin is None else old.origin.slots
            used = (*[slice(None)] * axis, slice(start, was.shape[axis]))
            new[used] = was[used]
            tensors[spec.name] = new
        return Buffers({**old.tensors, **tensors}, old.spares, origin=old.origin)

    def taken(self, specs: Sequence[StateSpec], old: Buffers, rows: Sequence[int], capacity: int) -> Buffers:
        """See :meth:`Storage.taken`."""
        index = list(rows)
        return Buffers({n: a[index] for n, a in old.tensors.items()}, {n: a[index] for n, a in old.spares.items()})

    def put(self, spec: StateSpec, target: Any, row: int, source: Any, capacities: tuple[int, int]) -> None:
        """See :meth:`Storage.put`."""
        axis = spec.capacity_axis
        used = () if axis is None else (slice(None),) * (axis - 1) + (slice(0, min(capacities)),)
        target[row][used] = source[0][used]

    def clear(self, tensor: Any) -> None:
        """See :meth:`Storage.clear`."""
        tensor[...] = 0

    def read(self, spec: StateSpec, tensor: Any) -> Array:
        """The array itself."""
        found: Array = tensor
        return found

    def write(self, spec: StateSpec, tensor: Any, array: Array) -> None:
        """See :meth:`Storage.write`."""
        tensor[tuple(slice(0, n) for n in array.shape)] = array


HOST = HostStorage()


def _zeros(spec: StateSpec, batch: int, capacity: int) -> Array:
    """A tensor that begins where a line of a cache does: attention reads whole lines, and two for each otherwise."""
    try:
        size = spec.nbytes(batch, capacity)
        memory = np.zeros(size + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        return memory[start : start + size].view(host_dtype(spec.dtype)).reshape(spec.resolve(batch, capacity))
    except (MemoryError, ValueError, TypeError, OverflowError) as error:  # numpy's ways to say: too large, or no type
        raise too_large(spec, batch, capacity, error) from error
