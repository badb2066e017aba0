"""Linear layers, whatever a target multiplies with: what all its rules for them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.context import Lowering, Rule
from edgellm_exporters.lowering.scan import MatMul
from edgellm_exporters.quantize.plan import QuantizedWeight

__all__ = ["Product", "fused_matmul", "linear_rule"]

Product = Callable[[Lowering, ir.Value, ir.Value, QuantizedWeight], ir.Value]  # of x and a quantized weight


def linear_rule(matmul: MatMul) -> Rule:
    """The rule for Linear, X W^T + b, of a target that multiplies so."""

    def linear(context: Lowering, view: View) -> Sequence[ir.Value]:
        return [matmul(context, view.x, view.weight, view.bias)]

    return linear


def fused_matmul(product: Product) -> MatMul:
    """X W^T + b: a kernel's own product for a quantized weight, MatMul for a float one."""

    def matmul(context: Lowering, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        quantized = context.quantized(weight)
        if quantized is None:
            return standard.matmul(context, x, weight, bias)
        y = product(context, x, weight, quantized)
        return y if bias is None else context.op("Add", y, bias)

    return matmul
