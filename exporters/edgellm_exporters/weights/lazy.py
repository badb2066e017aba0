"""A graph's weights that are read when they are asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch
from numpy.typing import NDArray

from edgellm.streaming import Weights

__all__ = ["LazyWeight"]


class LazyWeight(ir.LazyTensor):
    """A graph's weight that is read when it is asked for, whole or by rows.

    Args:
        weights: where it is.
        name: what the model calls it.
        shape: its shape.
        dtype: its dtype.
    """

    def __init__(self, weights: Weights, name: str, shape: torch.Size, dtype: ir.DataType) -> None:
        super().__init__(
            lambda: ir.tensor_adapters.TorchTensor(weights.read(name)), dtype=dtype, shape=ir.Shape(shape), name=name
        )
        self._rows = partial(weights.rows, name)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows of it."""
        found: NDArray[Any] = self._rows(start, stop).numpy()
        return found
