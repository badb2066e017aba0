"""One expert of a mixture, computed for the tokens that have chosen it, and not at all where none has.

An ONNX If for each expert: its products are those that the target has for any layer, quantized or not, over as many
rows as there are tokens with a share. TensorRT has no form with a number of rows that depends on numbers, and on CUDA
an If asks the device at every step: such targets have no rule, and compute every token, as the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.lowering.branches import choose
from edgellm_exporters.lowering.context import Lowering, Rule, shape_of
from edgellm_exporters.lowering.scan import Hoist, MatMul

__all__ = ["expert_rule"]


def expert_rule(matmul: MatMul, hoist: Hoist = lambda context, weight: None) -> Rule:
    """The rule for Expert.

    Args:
        matmul: X W^T + b, as the target has it.
        hoist: makes of a weight what each step would make of it anew, outside the branch.
    """

    def expert(context: Lowering, view: View) -> Sequence[ir.Value]:
        return _expert(context, view, matmul, hoist)

    return expert


def _expert(context: Lowering, view: View, matmul: MatMul, hoist: Hoist) -> Sequence[ir.Value]:
    total, x, share = view.total, view.x, view.share
    view.ignore(*view.op.inputs, *view.op.attributes)  # all are read in the branch
    for weight in (view.up, view.down, view.gate):
        if weight is not None:
            hoist(context, weight)
    some = _some(context, share)

    def chosen() -> list[ir.Value]:
        places = context.op("NonZero", context.op("Squeeze", share, context.const([2])))  # (2, chosen)
        rows = context.op("Transpose", places, perm=[1, 0])  # (chosen, 2): row and token
        own = _rows(context.op("GatherND", x, rows), view.up)
        hidden = _rows(_between(context, view, own, matmul), view.down)
        y = matmul(context, hidden, view.down, view.down_bias)  # (chosen, width)
        weighted = context.op("Mul", y, context.op("GatherND", share, rows))
        return [context.op("ScatterND", total, rows, weighted, reduction="add")]

    return choose(context, f"{view.sum.name}.chosen", some, chosen, lambda: [context.op("Identity", total)])


def _rows(x: ir.Value, weight: ir.Value) -> ir.Value:
    """The same, as rows that a weight reads: products look at how many axes there are."""
    x.shape, x.type = ir.Shape(["chosen", shape_of(weight)[1]]), ir.TensorType(ir.DataType.FLOAT)
    return x


def _some(context: Lowering, share: ir.Value) -> ir.Value:
    """Whether any token has a share (batch, time, 1), one boolean; those of a whole mixture are told together."""
    split = share.producer()
    if split is None or split.op_type != "Split" or any(_last_size(part) != 1 for part in split.outputs):
        return _any(context, share, [0, 1, 2])
    shares, count = split.inputs[0], len(split.outputs)
    assert shares is not None

    def make() -> list[ir.Value]:
        return context.ops(count, "Split", _any(context, shares, [0, 1]), axis=0, num_outputs=count)

    return context.once(("chosen at all", shares), make)[share.index() or 0]


def _any(context: Lowering, shares: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Whether there is a number but 0 along some axes."""
    return context.op("Cast", context.op("ReduceL1", shares, context.const(axes), keepdims=0), to=ir.DataType.BOOL)


def _last_size(value: ir.Value) -> int | None:
    size = None if value.shape is None else value.shape[-1]
    return size if isinstance(size, int) else None


def _between(context: Lowering, view: View, x: ir.Value, matmul: MatMul) -> ir.Value:
    """The features (chosen, features) that the last matrix reads."""
    hidden, gate = matmul(context, x, view.up, view.up_bias), None
    if view.packed:
        gate, hidden = context.ops(2, "Split", hidden, axis=-1, num_outputs=2)
    elif view.gate is not None:
        gate = matmul(context, x, view.gate, view.gate_bias)
    if gate is None:
        return _activated(context, view.activation, hidden, 1.0)
    if view.limit:
        low, high = (context.const(bound, np.float32) for bound in (-view.limit, view.limit))
        gate, hidden = context.op("Min", gate, high), context.op("Clip", hidden, low, high)
    if view.offset:
        hidden = context.op("Add", hidden, context.const(view.offset, np.float32))
    return context.op("Mul", _activated(context, view.activation, gate, view.slope), hidden)


def _activated(context: Lowering, name: str, x: ir.Value, slope: float) -> ir.Value:
    """An activation of slope * x, divided by the slope."""
    if name == "silu":
        inner = x if slope == 1 else context.op("Mul", x, context.const(slope, np.float32))
        return context.op("Mul", x, context.op("Sigmoid", inner))
    if slope != 1:
        by = context.const(slope, np.float32)
        return context.op("Div", _activated(context, name, context.op("Mul", x, by), 1.0), by)
    if name.startswith("gelu"):
        return context.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    y = context.op("Relu", x)
    return context.op("Mul", y, y) if name == "relu2" else y
