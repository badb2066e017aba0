"""Scales of 8 bits in a graph, which become floats when the library folds what does not change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.context import Lowering
from edgellm_exporters.quantize.scales import in_bytes
from edgellm_runtime.graphs.narrow_scales import POWERS

__all__ = ["scales_of"]


def scales_of(context: Lowering, weight: ir.Value) -> ir.Value:
    """A quantized weight's scales, (rows, blocks): 8 or 16 bits in the file, widened when the graph is loaded.

    A row of 8-bit scales begins with a byte for its power of two, which is looked up: a power that a library computes
    need not be exact.
    """
    quantized = context.quantized(weight)
    assert quantized is not None
    if quantized.scheme.scale_bits == 16:
        return standard.scales_of(context, weight)
    blocks = quantized.blocks
    like = np.broadcast_to(np.uint8(0), (quantized.shape[0], 1 + blocks))
    stored = context.part(weight, "scales", quantized.lazy(lambda c: in_bytes(c.scales), like))

    def make() -> ir.Value:
        table = context.const(POWERS, np.float32)
        power, numbers = context.ops(2, "Split", stored, context.const([1, blocks]), axis=1)
        units = context.op("Gather", table, context.op("Cast", power, to=ir.DataType.INT32))  # (rows, 1)
        return context.op("Mul", context.op("Cast", numbers, to=ir.DataType.FLOAT), units)

    return context.once(("scales", weight.name), make)
