"""How the error of a layer's products grows with errors in its weights: what GPTQ and its refinement go by.

Both read a square matrix of all columns, GPTQ a factor of its inverse. Of wide layers these are hundreds of megabytes
each: they are made in place, and kept on disk while the other is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.weights.scratch_file import ScratchFile
from edgellm_runtime.freed_pages import trim

__all__ = ["Curvature"]

# Of the mean diagonal. The GPTQ paper has 0.01, with which errors on another kind of text are up to a quarter larger.
_DAMPING = 0.2
_HELD_BYTES = 64 << 20  # of a matrix in float32: smaller ones stay in memory
_STEP = 512  # rows and columns that are worked on at a time
_Parts = Callable[[], Iterator[Tensor]]


class Curvature:
    """The sum of x x^T over a layer's inputs x, damped.

    Args:
        hessian: (columns, columns), that sum; it can be let go of afterwards.
        directory: for what is too large to be held; None for where temporary files are.
    """

    def __init__(self, hessian: Tensor, directory: Path | None = None) -> None:
        self.columns = len(hessian)
        large = 4 * hessian.numel() > _HELD_BYTES
        self._file = ScratchFile(directory) if large else None
        diagonal = hessian.diagonal().double()
        diagonal[diagonal == 0] = 1  # an input that is always zero: its weights do not matter
        diagonal += _DAMPING * diagonal.mean()
        self._diagonal = diagonal  # (columns,), of which float32 holds less
        self._damped = self._kept(self._rows_of(hessian))
        self._factor: _Parts | None = None

    def damped(self) -> Tensor:
        """The matrix itself, (columns, columns), float32."""
        return self._whole(self._damped())

    def factor(self) -> Tensor:
        """The upper Cholesky factor of its inverse, (columns, columns), float32.

        Raises:
            QuantizeError: the inputs were not finite.
        """
        if self._factor is None:
            self._factor = self._kept(self._factored())
        return self._whole(self._factor())

    def _rows_of(self, hessian: Tensor) -> Iterator[Tensor]:
        for start in range(0, self.columns, _STEP):
            some = hessian[start : start + _STEP].float().clone()
            some.diagonal(start).copy_(self._diagonal[start : start + _STEP])
            yield some

    def _factored(self) -> Iterator[Tensor]:
        """Rows of the factor, in one matrix of float64.

        With L the lower factor of the matrix whose rows and columns are in reverse, its inverse in reverse is the upper
        factor of the inverse: that takes half of the time of inverting first, and no second matrix.
        """
        work, size = self._reversed().mT, self.columns  # symmetric; as LAPACK has its columns
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(work, out=(work, failed))
        if failed.item() or not work.diagonal().isfinite().all():
            raise QuantizeError("the calibration inputs of a layer are not finite or degenerate")
        _invert_lower(work)
        for start in range(0, size, _STEP):
            stop = min(start + _STEP, size)
            yield work[size - stop : size - start].float().flip(0, 1).triu_(start)
            trim()

    def _reversed(self) -> Tensor:
        """The matrix in float64, its rows and columns in reverse."""
        work, stop = torch.empty(self.columns, self.columns, dtype=torch.float64), self.columns
        for part in self._damped():
            work[stop - len(part) : stop] = part.flip(0, 1)
            stop -= len(part)
            del part
            trim()  # what is free would be held beside the largest matrix that there is
        work.diagonal().copy_(self._diagonal.flip(0))
        return work

    def _kept(self, parts: Iterator[Tensor]) -> _Parts:
        """What gives a matrix (columns, columns) again, some rows at a time."""
        if self._file is None:
            whole = self._whole(parts)
            return lambda: iter((whole,))
        readers = [self._file.write(part) for part in parts]
        return lambda: (read() for read in readers if read is not None)

    def _whole(self, parts: Iterator[Tensor]) -> Tensor:
        first = next(parts)
        if len(first) == self.columns:
            return first
        whole, start = torch.empty(self.columns, self.columns), len(first)
        whole[:start] = first
        for part in parts:
            whole[start : start + len(part)] = part
            start += len(part)
        return whole


def _invert_lower(matrix: Tensor) -> None:
    """A lower triangular matrix becomes its inverse, in place; what is above the diagonal is not read."""
    starts = list(range(0, len(matrix), _STEP))
    for start in reversed(starts):
        own = slice(start, start + _STEP)
        corner = matrix[own, own]
        corner.copy_(torch.linalg.solve_triangular(corner, torch.eye(len(corner), dtype=matrix.dtype), upper=False))
        for below in reversed([other for other in starts if other > start]):
            rows, made = slice(below, below + _STEP), slice(start + _STEP, below + _STEP)
            matrix[rows, own] = (matrix[rows, made] @ matrix[made, own]).neg_() @ corner
