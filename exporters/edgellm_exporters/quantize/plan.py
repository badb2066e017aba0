"""Which weights are quantized and how: the one thing that quantizers decide and lowerings read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.errors import QuantizeError

__all__ = ["STORAGE", "Codes", "Plan", "QuantizedWeight", "Quantizer", "Scheme", "pack"]

STORAGE = "edgellm.storage"


@dataclass(frozen=True)
class Scheme:
    """A blockwise integer format for the rows of a weight: weight = (code - zero) * scale.

    Args:
        bits: of one code: 2, 4 or 8.
        block: how many neighbours in a row share a scale; a power of two from 16 to 256.
        symmetric: whether every zero is the middle code; otherwise each block has its own.
    """

    bits: int
    block: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise QuantizeError(f"{self.bits}-bit weights are not supported; use 2, 4 or 8")
        if self.block not in (16, 32, 64, 128, 256):
            raise QuantizeError(f"block size {self.block} is not a power of two from 16 to 256")

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The code that stands for zero in a symmetric block."""
        return int(2 ** (self.bits - 1))

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for one weight, its share of the 16-bit scale and of the zero included."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.block

    def __str__(self) -> str:
        return f"{self.bits}-bit block {self.block}{'' if self.symmetric else ' asymmetric'}"


@dataclass(frozen=True)
class Codes:
    """A quantized weight's numbers. Scales are stored in 16 bits, so they hold no more than float16 can."""

    codes: NDArray[np.uint8]  # (rows, columns), 0 to the scheme's top
    scales: NDArray[np.float32]  # (rows, columns / block)
    zeros: NDArray[np.uint8]  # (rows, columns / block)

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 weight that these numbers stand for, (rows, columns)."""
        rows, blocks = self.scales.shape
        wide = self.codes.reshape(rows, blocks, -1).astype(np.float32) - self.zeros[:, :, None]
        return (wide * self.scales[:, :, None]).reshape(rows, -1)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put neighbours in a row into bytes, the first in the lowest bits; a last byte that is not full ends in zeros.

    Args:
        codes: (rows, columns), each below 2**bits.
        bits: 2, 4 or 8.

    Returns:
        (rows, ceil(columns * bits / 8)).
    """
    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    packed = np.zeros((codes.shape[0], padded.shape[1] // each), dtype=np.uint8)
    for place in range(each):
        packed |= padded[:, place::each] << (bits * place)
    return packed


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight's scheme, with its numbers computed when they are asked for."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    compute: Callable[[], Codes]

    @property
    def blocks(self) -> int:
        """How many blocks a row has."""
        return self.shape[1] // self.scheme.block

    def lazy(self, part: Callable[[Codes], NDArray[Any]], like: NDArray[Any], storage: str = "") -> ir.LazyTensor:
        """A tensor made from the numbers when the graph is written.

        Args:
            part: from the numbers to the tensor, in the target's layout.
            like: an array of that shape and dtype; its content is not read.
            storage: tensors of one storage have the same bytes and are written once.
        """
        return ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(part(self.compute()))),
            dtype=ir.DataType.from_numpy(like.dtype),
            shape=ir.Shape(like.shape),
            metadata_props={STORAGE: storage} if storage else {},
        )


Quantizer = Callable[[str, NDArray[np.float32], Scheme], Codes]


@dataclass
class Plan:
    """Schemes for weights, by name.

    Args:
        schemes: weight name to scheme; weights that are not named stay as they are.
        quantize: computes the numbers from a weight's name, its values (rows, columns) and its scheme.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    quantize: Quantizer | None = None
    _last: tuple[str, Codes] | None = field(default=None, repr=False)

    def find(self, name: str, tensor: ir.TensorProtocol) -> QuantizedWeight | None:
        """How to quantize this weight, or None to leave it alone."""
        if name not in self.schemes or self.quantize is None:
            return None
        scheme, (rows, columns) = self.schemes[name], tensor.shape.numpy()
        if columns % scheme.block:
            raise QuantizeError(
                f"{name}: rows of {columns} weights do not divide into blocks of {scheme.block}; choose a smaller block"
            )
        return QuantizedWeight(name, (rows, columns), scheme, lambda: self._codes(name, tensor, scheme))

    def _codes(self, name: str, tensor: ir.TensorProtocol, scheme: Scheme) -> Codes:
        # A weight's parts are written one after the other: remembering the last keeps memory flat.
        if self._last is None or self._last[0] != name:
            assert self.quantize is not None
            weight = np.asarray(tensor.numpy(), dtype=np.float32)
            if not np.isfinite(weight).all():
                raise QuantizeError(f"{name} holds NaN or infinite weights; train or download the checkpoint again")
            self._last = (name, self.quantize(name, weight, scheme))
        return self._last[1]
