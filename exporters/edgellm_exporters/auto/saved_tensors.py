"""What autograd saves between forward and backward, out of memory: weights are read again, the rest is on disk.

Numbers, shapes and strides, but for axes of size 1, are those that were saved, so that on one processor, with as many
threads, gradients have the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgellm.streaming import Weights
from edgellm_exporters.weights.scratch_file import ScratchFile

__all__ = ["SavedTensors"]

_LEAST = 1 << 16  # bytes that are worth a place on disk
# Weights that were read last, by which autograd's are known: each is used right after it is read. So many, and fewer of
# large ones, down to the few that a module may have; one that is not known is kept on disk.
_RECENT, _RECENT_BYTES, _FEWEST = 16, 64 << 20, 4


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
        while len(self._recent) > _FEWEST and sum(tensor.nbytes for tensor, _ in self._recent) > _RECENT_BYTES:
            self._recent.popleft()
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
