"""Tensors on disk that are computed once and read again.

Nothing is buffered: what a full disk did not take is not tried again when something else is read.
"""

from __future__ import annotations

import math
import tempfile
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Reader", "ScratchFile"]


class Reader(Protocol):
    """Reads one tensor again, from any thread."""

    def __call__(self, rows: tuple[int, int] | None = None) -> Tensor:
        """All of it, or the rows from one to before another of one that was contiguous."""
        ...


@dataclass(frozen=True)
class _Place:
    """Where a tensor's numbers lie in a file, and how they are to be seen."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]  # as they lie
    order: tuple[int, ...]  # of these dimensions in the tensor


class ScratchFile:
    """Tensors in a file without a name, which goes with this object.

    Args:
        directory: where the file is to be; None for where temporary files are.
    """

    def __init__(self, directory: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end, self._lock = 0, threading.Lock()  # of the file's one position

    def write(self, tensor: Tensor) -> Reader | None:
        """Keep a tensor; what reads it again, or None where its numbers do not lie side by side.

        Raises:
            OSError: the disk is full, which leaves what was kept before as it was.
        """
        strides = tensor.stride()
        order = list(range(tensor.dim()))
        if not tensor.is_contiguous():  # else strides of axes of size 1 may be anything
            order.sort(key=lambda axis: -strides[axis])
        lying = tensor.detach().permute(order)
        if not lying.is_contiguous():
            return None
        lies = tuple(order.index(axis) for axis in range(tensor.dim()))
        with self._lock:
            place = _Place(self._end, tensor.dtype, tuple(lying.shape), lies)
            self._file.seek(self._end)
            left = memoryview(_bytes_of(lying))
            while left:
                left = left[self._file.write(left) :]
            self._end = self._file.tell()
        return partial(self._read, place)

    def _read(self, place: _Place, rows: tuple[int, int] | None = None) -> Tensor:
        shape, skipped = place.shape, 0
        if rows is not None:
            assert place.order == tuple(range(len(shape))), "rows lie one after another"
            shape, skipped = (rows[1] - rows[0], *shape[1:]), rows[0] * math.prod(shape[1:]) * place.dtype.itemsize
        found = torch.empty(shape, dtype=place.dtype)
        into = memoryview(_bytes_of(found))
        with self._lock:
            self._file.seek(place.offset + skipped)
            while into:
                count = self._file.readinto(into)  # type: ignore[attr-defined]
                assert count, "what was written is there"
                into = into[count:]
        return found.permute(place.order)

    def clear(self) -> None:
        """Let go of all tensors."""
        self._end = 0
        self._file.truncate(0)


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
