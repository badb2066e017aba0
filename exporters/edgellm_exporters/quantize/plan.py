"""Which weights are quantized and how: the one thing that quantizers decide and lowerings read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.smooth import Smoothing

__all__ = [
    "ROW",
    "STORAGE",
    "Codes",
    "Plan",
    "QuantizedWeight",
    "Quantizer",
    "Scheme",
    "joined",
    "pack",
    "unpack",
    "widens",
]

STORAGE = "edgellm.storage"
_ROWS_BYTES = 16 << 20  # of float32 weights that are quantized at a time
_PACKED_BYTES = 8 << 20  # of codes that are put into bytes at a time
_SMALL = 1 << 19  # numbers in a recurrence's larger weight: 2 MB when they are widened


ROW = 0
_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Scheme:
    """An integer format for the rows of a weight: weight = (code - zero) * scale, or that plus a shift.

    Args:
        bits: of one code: 2, 3, 4 or 8. Kernels hold 3-bit codes as 4-bit ones; they take 3 bits in files alone.
        block: how many neighbours in a row share a scale: a power of two from 16 to 256, or :data:`ROW` for the whole
            row. Products with a ``ROW`` weight are integer products: the inputs are rounded to 8 bits with one scale
            for each of their rows.
        symmetric: whether every zero is the middle code; otherwise each block has its own.
        shifted: whether each block also has a shift, which no whole zero can stand for: what GGUF's Q4_1 and Q4_K call
            a minimum. A shift meets the sum of the block's inputs, so shifts are further columns of the weight; they
            are stored in as many bits as the codes.
        positive: whether no scale may be negative; otherwise a symmetric block of few bits may have such a one, so that
            its largest weight gets the code below zero that has no counterpart above.
        floating: whether codes are 8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa) instead of whole numbers.
        scale_bits: of one scale in the file: 16, a float16; or 8, a whole number times a power of two that the row has,
            which is a float16 too (see :mod:`.scales`).
    """

    bits: int
    block: int = 32
    symmetric: bool = True
    shifted: bool = False
    positive: bool = False
    floating: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise QuantizeError(f"{self.bits}-bit weights are not supported; use 2, 3, 4 or 8")
        if self.block == ROW:
            if self.bits != 8 or not self.symmetric or self.shifted:
                raise QuantizeError(f"{self}: one scale a row is for symmetric 8-bit weights; give a block size")
        elif self.block not in _BLOCKS:
            raise QuantizeError(f"block size {self.block} is not a power of two from 16 to 256")
        if self.floating and (self.bits != 8 or self.block != ROW):
            raise QuantizeError(f"{self}: floating codes are for 8-bit weights with one scale a row")
        if self.shifted and self.symmetric:
            raise QuantizeError(f"{self}: a shifted format has zeros of its own; make it asymmetric")
        if self.bits == 3 and (self.symmetric or self.shifted):
            raise QuantizeError(f"{self}: codes of 3 bits have zeros and no shifts, as in 3:{self.block}:asymmetric")
        self._check_scales()

    def _check_scales(self) -> None:
        if self.scale_bits not in (8, 16):
            raise QuantizeError(f"{self.scale_bits}-bit scales are not supported; use 8 or 16")
        if self.scale_bits == 8 and self.block == ROW:
            raise QuantizeError(f"{self}: a row's one scale has 16 bits; give a block size, or leave 8-bit scales out")
        if self.scale_bits == 8 and self.signed:
            raise QuantizeError(f"{self}: scales of 8 bits have no sign; make the format asymmetric")

    @property
    def signed(self) -> bool:
        """Whether scales may be negative."""
        return self.symmetric and not self.positive and self.bits < 8

    @property
    def narrow(self) -> Scheme:
        """The same with scales of 8 bits, or itself if there is none such."""
        return self if self.block == ROW or self.signed else replace(self, scale_bits=8)

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The code that stands for zero in a symmetric block."""
        return int(2 ** (self.bits - 1))

    @property
    def kernel_bits(self) -> int:
        """Of one code as kernels read it."""
        return 4 if self.bits == 3 else self.bits

    def blocks(self, columns: int) -> int:
        """How many scales a row of that many weights has, those of its shifts included."""
        if self.block == ROW:
            return 1
        blocks = columns // self.block
        return blocks + -(-blocks // self.block) if self.shifted else blocks

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that a weight of that shape takes in a file: codes, scales and zeros."""
        blocks = self.blocks(columns)
        codes = columns if self.block == ROW else blocks * self.block * self.bits // 8
        zeros = 0 if self.symmetric else -(-blocks * self.kernel_bits // 8)
        scales = 2 * blocks if self.scale_bits == 16 else blocks + 1
        return int(rows * (codes + scales + zeros))

    def __str__(self) -> str:
        kind = " float" if self.floating else " shifted" if self.shifted else "" if self.symmetric else " asymmetric"
        scales = "" if self.scale_bits == 16 else f", {self.scale_bits}-bit scales"
        return f"{self.bits}-bit {'row' if self.block == ROW else f'block {self.block}'}{kind}{scales}"


@dataclass(frozen=True)
class Codes:
    """A quantized weight's numbers. Scales are stored in 16 bits or fewer: float16 holds each.

    Args:
        codes: (rows, blocks * block), 0 to the scheme's top; blocks that are not full end in zeros.
        scales: (rows, blocks).
        zeros: (rows, blocks).
        columns: of the weight itself, where its shifts follow in further blocks; 0 where there are none.
        floating: whether each code is the byte of an 8-bit float; zeros are then 0.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    columns: int = 0
    floating: bool = False

    def of_rows(self, start: int, stop: int) -> Codes:
        """The numbers of some rows; not copies."""
        some = slice(start, stop)
        return Codes(self.codes[some], self.scales[some], self.zeros[some], self.columns, self.floating)

    def signed(self, dtype: Any) -> NDArray[Any]:
        """Codes less their zeros, (rows, columns), in a type that holds them."""
        if self.floating:
            floats: NDArray[Any] = self.codes.view(ml_dtypes.float8_e4m3fn).astype(dtype)
            return floats
        rows, blocks = self.scales.shape
        wide = self.codes.reshape(rows, blocks, -1).astype(np.int16) - self.zeros[:, :, None].astype(np.int16)
        whole: NDArray[Any] = wide.reshape(rows, -1).astype(dtype)
        return whole

    def dequantize(self) -> NDArray[np.float32]:
        """The float32 weight that these numbers stand for, (rows, columns)."""
        wide = self._wide()
        if not self.columns:
            return wide
        shifts = self.shifts()
        return wide[:, : self.columns] + np.repeat(shifts, self.columns // shifts.shape[1], axis=1)

    def shifts(self) -> NDArray[np.float32]:
        """The shift of each block, (rows, blocks); of a weight that has such."""
        block = self.codes.shape[1] // self.scales.shape[1]
        return self._wide()[:, self.columns : self.columns + self.columns // block]

    def _wide(self) -> NDArray[np.float32]:
        """Codes times scales, (rows, blocks * block), shifts included."""
        rows, blocks = self.scales.shape
        if self.floating:
            wide = self.signed(np.float32).reshape(rows, blocks, -1)
        else:  # in place, for this is done to every weight of a model, and again for each pass over them
            wide = self.codes.astype(np.float32).reshape(rows, blocks, -1)
            wide -= self.zeros[:, :, None]
        wide *= self.scales[:, :, None]
        whole: NDArray[np.float32] = wide.reshape(rows, -1)
        return whole


def widens(*weights: tuple[Scheme | None, int]) -> bool:
    """Whether a recurrence computes in floats, its weights' codes widened once, where the library folds constants.

    A loop over the cell costs more time at each token than the products of weights that lie in the processor's cache.

    Args:
        weights: the scheme of each of its weights, None for floats, and how many numbers it has.
    """
    return all(s is None or (s.bits == 8 and not s.shifted and size <= _SMALL) for s, size in weights)


def joined(parts: Iterable[Codes], rows: int | None = None) -> Codes:
    """The numbers of the weight that has the rows of all parts.

    Args:
        parts: at least one.
        rows: of all parts, where that is known: then no more than one of them is in memory beside the whole.
    """
    if rows is None:
        held = list(parts)
        return held[0] if len(held) == 1 else joined(held, sum(len(part.codes) for part in held))
    whole: Codes | None = None
    start = 0
    for part in parts:
        if whole is None:
            codes, scales, zeros = (
                np.empty((rows, a.shape[1]), a.dtype) for a in (part.codes, part.scales, part.zeros)
            )
            whole = Codes(codes, scales, zeros, part.columns, part.floating)
        stop = start + len(part.codes)
        whole.codes[start:stop], whole.scales[start:stop], whole.zeros[start:stop] = part.codes, part.scales, part.zeros
        start = stop
    assert whole is not None
    return whole


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put neighbours in a row into bytes, the first in the lowest bits; a last byte that is not full ends in zeros.

    Args:
        codes: (rows, columns), each below 2**bits.
        bits: 2, 4 or 8.

    Returns:
        (rows, ceil(columns * bits / 8)).
    """
    if bits == 8:
        return codes
    each = 8 // bits
    packed = np.empty((codes.shape[0], -(-codes.shape[1] // each)), dtype=np.uint8)
    step = max(1, _PACKED_BYTES // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):  # what is made on the way is as large as the codes
        some = codes[start : start + step]
        packed[start : start + step] = some[:, ::each]
        for place in range(1, each):
            lane = some[:, place::each]
            packed[start : start + step, : lane.shape[1]] |= lane << (bits * place)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """The codes (rows, columns) that :func:`pack` put into bytes."""
    if bits == 8:
        return packed
    each = 8 // bits
    codes = np.empty((packed.shape[0], packed.shape[1] * each), dtype=np.uint8)
    for place in range(each):
        codes[:, place::each] = (packed >> np.uint8(bits * place)) & np.uint8(2**bits - 1)
    return codes[:, :columns]


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight's scheme, with its numbers computed when they are asked for."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme
    compute: Callable[[], Codes]

    @property
    def blocks(self) -> int:
        """How many scales a row has."""
        return self.scheme.blocks(self.shape[1])

    @property
    def padded(self) -> int:
        """How many codes a row has, padding and shifts included."""
        return self.shape[1] if self.scheme.block == ROW else self.blocks * self.scheme.block

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
        smoothing: what the graph's weights were multiplied with before.
        caches: the states that are kept in fewer bits.
        inputs: what is multiplied with a weight is rounded to its codes with this scale, by the weight's name.
        floats: matrices that the method would quantize, but whose rows divide into no block, with their shapes.
        kept: weights whose codes are the checkpoint's own, by the names of the parts that were merged.
        left: weights that the checkpoint stores as codes which cannot be kept, with the reasons.
        orders: of weights that keep codes whose groups are no neighbours, the order of columns in which they are, by
            the names of the parts that were merged; what is multiplied with them is put into that order.
        by_rows: weights whose rows may be quantized some at a time, so that a vocabulary's table is never whole; of
            those whose codes were chosen nothing is quantized.
        chosen: codes that are not computed from a weight, by the names of the parts that were merged.
        calibrated: whether some of them were chosen on a text.
        vectors: factors on the numbers of norms' gains and of biases, by name, where they were tuned too.
        tuned: what became of each layer and of all scales, where codes were tuned; for the manifest.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    quantize: Quantizer | None = None
    smoothing: Smoothing = field(default_factory=Smoothing)
    caches: NarrowCaches = field(default_factory=NarrowCaches)
    inputs: Mapping[str, np.float32] = field(default_factory=dict)
    floats: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    left: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    by_rows: frozenset[str] = frozenset()
    chosen: Mapping[str, Codes] = field(default_factory=dict)
    calibrated: bool = False
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    _last: tuple[str, Codes] | None = field(default=None, repr=False)

    @property
    def rounds(self) -> bool:
        """Whether a bundle's numbers are others than the model's."""
        return bool(self.schemes) or bool(self.caches)

    def forget(self) -> None:
        """Drop the numbers that were computed last: a graph is written."""
        self._last = None

    def find(self, name: str, tensor: ir.TensorProtocol) -> QuantizedWeight | None:
        """How to quantize this weight, or None to leave it alone."""
        if name not in self.schemes or self.quantize is None:
            return None
        scheme, (rows, columns) = self.schemes[name], tensor.shape.numpy()
        if scheme.block != ROW and columns % scheme.block:
            raise QuantizeError(
                f"{name}: rows of {columns} weights do not divide into blocks of {scheme.block}; choose a smaller block"
            )
        return QuantizedWeight(name, (rows, columns), scheme, lambda: self._codes(name, tensor, scheme))

    def _codes(self, name: str, tensor: ir.TensorProtocol, scheme: Scheme) -> Codes:
        # A weight's parts are written one after the other: remembering the last keeps memory flat.
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._computed(name, tensor, scheme))
        return self._last[1]

    def chosen_of(self, name: str) -> Codes | None:
        """The codes that were chosen for a weight, put together where it was merged; None where there are none."""
        parts = parts_of(name)
        return joined(self.chosen[part] for part in parts) if all(part in self.chosen for part in parts) else None

    def _computed(self, name: str, tensor: ir.TensorProtocol, scheme: Scheme) -> Codes:
        assert self.quantize is not None
        if (found := self.chosen_of(name)) is not None:
            return found
        rows_of = getattr(tensor, "rows", None)  # of a weight that can be read by rows
        total, columns = tensor.shape.numpy()
        if rows_of is None or name not in self.by_rows:
            return self.quantize(name, in_range(name, np.asarray(tensor.numpy(), dtype=np.float32)), scheme)
        step = max(1, _ROWS_BYTES // (4 * columns))
        pieces = (np.asarray(rows_of(i, min(i + step, total)), dtype=np.float32) for i in range(0, total, step))
        return joined((self.quantize(name, in_range(name, piece), scheme) for piece in pieces), total)
