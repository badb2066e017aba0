"""The bytes with 4-bit codes that kernels read, made in the graph of the 3 bits a code that its file holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.lowering.context import Lowering
from edgellm_exporters.quantize.plan import Codes, QuantizedWeight, pack
from edgellm_runtime.graphs.three_bits import CODES, PARTS, PLACES, SHIFTS, condensed

__all__ = ["apart", "spread_codes"]

_LOW = 0x0F


def spread_codes(
    context: Lowering, weight: ir.Value, quantized: QuantizedWeight, *, halves: bool = False
) -> ir.Value:  # fmt: skip
    """Bytes with two codes each, (4, rows * columns / 8).

    Args:
        context: of the lowering.
        weight: of 3-bit codes.
        quantized: its numbers.
        halves: whether a byte has a code of the weight's first half and one of the second, instead of neighbours.
    """

    def make() -> ir.Value:
        size = quantized.shape[0] * quantized.padded // (2 * (PARTS + 1))
        stored = quantized.lazy(
            lambda c: condensed(_halves(c) if halves else pack(c.codes, 4)), np.broadcast_to(np.uint8(0), (PARTS, size))
        )
        parts = context.part(weight, "three_bits", stored)
        own = context.op("BitwiseAnd", parts, context.const(CODES, np.uint8))
        shifted = context.op("BitShift", parts, context.const([[n] for n in SHIFTS], np.uint8), direction="RIGHT")
        spare = context.op("BitwiseAnd", shifted, context.const([[n] for n in PLACES], np.uint8))
        first, second, third = context.ops(PARTS, "Split", spare, axis=0, num_outputs=PARTS)
        fourth = context.op("BitwiseOr", context.op("BitwiseOr", first, second), third)
        return context.op("Concat", own, fourth, axis=0)

    return context.once(("spread codes", weight.name), make)


def apart(context: Lowering, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """Codes of a byte each, (rows, columns)."""

    def make() -> ir.Value:
        pairs = spread_codes(context, weight, quantized, halves=True)
        low = context.op("BitwiseAnd", pairs, context.const(_LOW, np.uint8))
        high = context.op("BitShift", pairs, context.const(4, np.uint8), direction="RIGHT")
        shape = context.const([quantized.shape[0], quantized.padded])
        return context.op("Reshape", context.op("Concat", low, high, axis=0), shape)

    return context.once(("codes apart", weight.name), make)


def _halves(codes: Codes) -> NDArray[np.uint8]:
    low, high = codes.codes.reshape(2, -1)
    return low | (high << np.uint8(4))
