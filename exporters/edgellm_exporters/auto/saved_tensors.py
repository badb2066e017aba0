"""What autograd saves between forward and backward, out of memory: weights are read again, the rest is on disk.

Numbers, shapes and strides, but for axes of size 1, are those that were saved, so that on one processor, with as many
threads, gradients have the same bits.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgellm.streaming import Weights

__all__ = ["SavedTensors", "ScratchFile"]

_LEAST = 1 << 16  # bytes that are worth a place on disk
_RECENT = 16  # weights that were read last, by which autograd's are known: each is used right after it is read


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

    def write(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """Keep a tensor; what reads it again, from any thread, or None where its numbers do not lie side by side."""
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
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

    def _read(self, place: _Place) -> Tensor:
        found = torch.empty(place.shape, dtype=place.dtype)
        into = memoryview(_bytes_of(found))
        with self._lock:
            self._file.seek(place.offset)
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


class SavedTensors:
    """Follows :class:`edgellm.streaming.Weights`, and tells autograd's tensors by what was read.

    Args:
        model: whose tensors are saved; parameters that it has in memory stay there.
        weights: where the others are.
        directory: of a file for what is not read again; None for where temporary files are.
    """

    def __init__(self, model: nn.Module, weights: Weights, directory: Path | None) -> None:
        self._weights, self._file = weights, ScratchFile(directory)
        self._own = {p.data_ptr() for p in model.parameters() if not p.is_meta}
        self._recent: deque[tuple[Tensor, Callable[[], Tensor]]] = deque(maxlen=_RECENT)

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._remembered(partial(self._weights.read, name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        return self._remembered(partial(self._weights.rows, name, start, stop))

    def _remembered(self, read: Callable[[], Tensor]) -> Tensor:
        found = read().detach()
        self._recent.append((found, read))
        return found

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Have what autograd saves for one forward and backward pass kept so."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda again: again()):
                yield
        finally:
            self._recent.clear()
            self._file.clear()

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        for weight, read in self._recent:
            if (weight.data_ptr(), weight.numel(), weight.dtype) == (tensor.data_ptr(), tensor.numel(), tensor.dtype):
                return partial(_seen_as, read, tensor.shape, tensor.stride())
        stays = tensor.numel() * tensor.element_size() < _LEAST or tensor.data_ptr() in self._own
        kept, held = None if stays else self._file.write(tensor), tensor.detach()
        return (lambda: held) if kept is None else kept


def _seen_as(read: Callable[[], Tensor], shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    found = read().detach()
    return found.as_strided(shape, stride, found.storage_offset())
