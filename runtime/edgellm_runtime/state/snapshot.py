"""What steps overwrite of a row, copied at one moment: its recurrences and rings. Caches that grow need no copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.storage import host_dtype

__all__ = ["Snapshot", "overwritten", "packed", "unpacked"]

_LENGTHS, _PREFIX = "__snapshots__", "__snapshot__."


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A row's recurrences and rings after so many tokens. ``State.snapshot`` makes one; nothing changes it.

    Args:
        length: tokens that the row held.
        written: the most that it had held since it was empty.
        arrays: by state name, in this process's memory, as ``Storage.read`` gives them.
    """

    length: int
    written: int
    arrays: Mapping[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def overwritten(specs: Sequence[StateSpec]) -> tuple[StateSpec, ...]:
    """Of a model's states those that a step overwrites, so that a row's earlier ones must be kept or are lost."""
    return tuple(spec for spec in specs if spec.update in ("replace", "ring"))


def packed(snapshots: Sequence[Snapshot]) -> dict[str, NDArray[Any]]:
    """Snapshots of one model as arrays for a file, by names that no state has; none for no snapshots."""
    if not snapshots:
        return {}
    arrays = {f"{_PREFIX}{name}": np.stack([s.arrays[name] for s in snapshots]) for name in snapshots[0].arrays}
    return {_LENGTHS: np.array([(s.length, s.written) for s in snapshots], dtype=np.int32), **arrays}


def unpacked(data: Mapping[str, NDArray[Any]], specs: Sequence[StateSpec], length: int) -> tuple[Snapshot, ...]:
    """What :func:`packed` made, of a file of which nothing is believed.

    Args:
        data: the file's arrays.
        specs: of the model's states.
        length: tokens of the row that they are of.

    Raises:
        ValueError: they cannot be snapshots of such a row.
    """
    if _LENGTHS not in data:
        return ()
    lengths = data[_LENGTHS]
    if lengths.dtype != np.int32 or lengths.ndim != 2 or lengths.shape[1] != 2:
        raise ValueError("lengths of snapshots that are none")
    held, written = lengths.T
    if (held < 1).any() or (held > length).any() or (np.diff(held) < 1).any() or (written < held).any():
        raise ValueError(f"snapshots after {held.tolist()[:9]} tokens of {length}")
    arrays = {spec.name: data[f"{_PREFIX}{spec.name}"] for spec in overwritten(specs)}
    for spec in overwritten(specs):
        expected = (len(lengths), *spec.resolve(1, 1))
        if arrays[spec.name].shape != expected or arrays[spec.name].dtype != host_dtype(spec.dtype):
            raise ValueError(f"snapshots of {spec.name} that are none")
    return tuple(
        Snapshot(int(held[i]), int(written[i]), {name: array[i].copy() for name, array in arrays.items()})
        for i in range(len(lengths))
    )
