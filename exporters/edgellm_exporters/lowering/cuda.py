"""Canonical ops as ONNX Runtime's fused kernels on CUDA, in 16 bits.

They are those of ``ort.py`` but for what differs there: GroupQueryAttention reads the longest row's length on the host,
so that it comes from outside (computed in the graph it would be copied back at every step, and no step could be
captured); weights in blocks meet activations that stay floats; and there is no integer product with a scale a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import ort, recurrent, standard
from edgellm_exporters.lowering.context import Lowering, Rule
from edgellm_exporters.lowering.linears import fused_matmul, linear_rule
from edgellm_exporters.lowering.window import by_products, window_rule
from edgellm_exporters.quantize.plan import ROW, QuantizedWeight
from edgellm_runtime.spec import TensorSpec

__all__ = ["RULES", "TOTAL_LENGTH"]

TOTAL_LENGTH = TensorSpec("total_length", (), "int32")


def attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GroupQueryAttention with the rotation inside and the cache written in place."""
    if ort.lacks_kernel(view):
        return standard.attention_rule(by_products)(context, view)
    return ort.grouped_attention(context, view, context.new_input(TOTAL_LENGTH))


def _product(context: Lowering, x: ir.Value, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """MatMulNBits."""
    (rows, columns), scheme = quantized.shape, quantized.scheme
    if scheme.block == ROW or scheme.bits not in (4, 8) or scheme.shifted:
        raise LoweringError(
            f"{weight.name}: ONNX Runtime multiplies no {scheme} weights on CUDA; use 4 or 8 bits in blocks"
        )
    codes = ort.codes_of(context, weight, (rows, quantized.blocks, scheme.block * scheme.bits // 8), "codes")
    return context.op(
        "MatMulNBits", x, codes, scales_of(context, weight), ort.zeros_of(context, weight), domain=ort.DOMAIN, N=rows,
        K=columns, bits=scheme.bits, block_size=scheme.block,
    )  # fmt: skip


def embedding(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GatherBlockQuantized of a quantized table, Gather of a float one."""
    weight, indices = view.weight, view.indices
    quantized = context.quantized(weight)
    if quantized is None:
        return standard.RULES["Embedding"](context, view)
    scheme = quantized.scheme
    shape = (quantized.shape[0], quantized.shape[1] * scheme.bits // 8)
    rows = context.op(
        "GatherBlockQuantized", ort.codes_of(context, weight, shape, "table"), indices, scales_of(context, weight),
        ort.zeros_of(context, weight), domain=ort.DOMAIN, bits=scheme.bits, block_size=scheme.block, gather_axis=0,
        quantize_axis=1,
    )  # fmt: skip
    return [rows]


def scales_of(context: Lowering, weight: ir.Value) -> ir.Value:
    """A quantized weight's scales, (rows, blocks), in numbers that the graph's dtype has too.

    They are float16 in the file; one that has fewer digits, so that it is bfloat16 as well, is the same number there.
    """
    quantized = context.quantized(weight)
    assert quantized is not None
    narrow = ml_dtypes.bfloat16 if context.dtype == "bfloat16" else np.float16
    like = np.broadcast_to(np.float16(0), (quantized.shape[0], quantized.blocks))
    stored = context.part(
        weight, "scales", quantized.lazy(lambda c: c.scales.astype(narrow).astype(np.float16), like)
    )  # fmt: skip
    return context.once(("scales", weight.name), lambda: context.op("Cast", stored, to=ir.DataType.FLOAT))


def _hoist(context: Lowering, weight: ir.Value) -> None:
    if context.quantized(weight) is not None:
        scales_of(context, weight)


_matmul = fused_matmul(_product)
RULES: Mapping[str, Rule] = {
    **{name: rule for name, rule in ort.RULES.items() if name != "Expert"},  # whose If would ask the device
    "Attention": attention,
    "Embedding": embedding,
    "Linear": linear_rule(_matmul),
    "WindowAttention": window_rule(standard.steps, by_products),
    # cuDNN refuses rows' lengths as ONNX Runtime 1.31 hands them over: CUDNN_STATUS_BAD_PARAM, on an H100
    **recurrent.rules(_matmul, hoist=_hoist, looped=True),
}
