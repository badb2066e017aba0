"""Which weights are quantized and how: the one thing that quantizers decide and lowerings read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.errors import QuantizeError

__all__ = ["STORAGE", "Codes", "Plan", "QuantizedWeight", "Scheme"]

STORAGE = "edgellm.storage"


@dataclass(frozen=True)
class Scheme:
    """A blockwise symmetric integer format for the rows of a weight.

    Args:
        bits: of one code.
        block: how many neighbours in a row share a scale.
    """

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in (8,):
            raise QuantizeError(f"{self.bits}-bit weights are not supported; use 8")
        if self.block < 16 or self.block & (self.block - 1):
            raise QuantizeError(f"block size {self.block} is not a power of two of at least 16")

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for one weight, its share of the float32 scale included."""
        return self.bits + 32 / self.block


@dataclass(frozen=True)
class Codes:
    """A quantized weight's numbers: weight = codes * scales, block by block."""

    codes: NDArray[np.int8]  # (rows, columns)
    scales: NDArray[np.float32]  # (rows, columns / block)

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 weight that these numbers stand for, (rows, columns)."""
        rows, blocks = self.scales.shape
        wide = self.codes.reshape(rows, blocks, -1).astype(np.float32)
        return (wide * self.scales[:, :, None]).reshape(rows, -1)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight's scheme, with its numbers computed when they are asked for."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    compute: Callable[[], Codes]

    def lazy(
        self, part: Callable[[Codes], NDArray[Any]], like: NDArray[Any], storage: str | None = None
    ) -> ir.LazyTensor:
        """A tensor made from the numbers when the graph is written.

        Args:
            part: from the numbers to the tensor, in the target's layout.
            like: an array of that shape and dtype; its content is not read.
            storage: tensors of one storage have the same bytes and are written once.
        """
        return ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(part(self.compute()))),
            dtype=ir.DataType.from_numpy(like.dtype), shape=ir.Shape(like.shape),
            metadata_props={STORAGE: storage} if storage else {},
        )  # fmt: skip


Quantize = Callable[[NDArray[np.float32], Scheme], Codes]


@dataclass
class Plan:
    """Schemes for weights, by name.

    Args:
        schemes: weight name to scheme; weights that are not named stay as they are.
        quantize: the method that computes the numbers.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    quantize: Quantize | None = None
    _last: tuple[str, Codes] | None = field(default=None, repr=False)

    def find(self, name: str, tensor: ir.TensorProtocol) -> QuantizedWeight | None:
        """How to quantize this weight, or None to leave it alone."""
        if name not in self.schemes or self.quantize is None:
            return None
        scheme, (rows, columns) = self.schemes[name], tensor.shape.numpy()
        if columns % scheme.block:
            raise QuantizeError(f"{name}: rows of {columns} weights do not divide into blocks of {scheme.block}")
        return QuantizedWeight(name, (rows, columns), scheme, lambda: self._codes(name, tensor, scheme))

    def _codes(self, name: str, tensor: ir.TensorProtocol, scheme: Scheme) -> Codes:
        # A weight's parts are written one after the other: remembering the last keeps memory flat.
        if self._last is None or self._last[0] != name:
            assert self.quantize is not None
            weight = np.asarray(tensor.numpy(), dtype=np.float32)
            if not np.isfinite(weight).all():
                raise QuantizeError(f"{name} holds NaN or infinite weights; train or download the checkpoint again")
            self._last = (name, self.quantize(weight, scheme))
        return self._last[1]
