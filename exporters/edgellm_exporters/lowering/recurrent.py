"""The recurrences: ONNX's own RNN, LSTM and GRU ops for float weights, a Scan over the cell for quantized ones.

Where the library computes with constants once, when it loads a graph, small 8-bit weights are widened then: a Scan
costs more time at each token than the products of a cell whose weights lie in the processor's cache anyway.

ONNX orders gates otherwise than PyTorch: LSTM i, o, f, c against i, f, g, o; GRU z, r, h against r, z, n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgellm.ops import GRU, LSTM, RNN
from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering.context import Array, Lowering, Rule, blank, shape_of
from edgellm_exporters.lowering.scan import Hoist, MatMul, scan
from edgellm_exporters.quantize.plan import Codes, QuantizedWeight, Scheme, widens

__all__ = ["reorder", "rules"]

_GATES = {RNN.name: (0,), LSTM.name: (0, 3, 1, 2), GRU.name: (1, 0, 2)}  # ONNX's gate i is PyTorch's _GATES[i]


def rules(matmul: MatMul, hoist: Hoist, *, folds: bool = False, looped: bool = False) -> Mapping[str, Rule]:
    """Rules for RNN, LSTM and GRU.

    Args:
        matmul: the target's product with a weight, quantized or not.
        hoist: prepares a weight for ``matmul`` outside the loop over tokens.
        folds: whether the target's library computes once what depends on constants alone.
        looped: whether float weights become a Scan too, because the library's own RNN, LSTM and GRU fail.
    """

    def rule(context: Lowering, view: View) -> Sequence[ir.Value]:
        if view.lengths is None:  # the graph serves ragged batches, and padding would run into the state
            raise LoweringError(f"{view.op.name} was called without lengths; pass step.lengths to edgellm.ops")
        both = (view.w_ih, view.w_hh)
        rounded = any(context.quantized(w) is not None for w in both)
        if looped or (rounded and not (folds and widens(*(_kept_as(context, w) for w in both)))):
            return scan(context, view, matmul, hoist)
        order, past = _GATES[view.op.name], view.all(view.op.states)
        weights = [_one_direction(context, w, order) for w in both]
        bias = _bias(context, view.b_ih, view.b_hh, order)
        direction = context.const([0])
        outputs = context.ops(
            1 + len(past), view.op.name, context.op("Transpose", view.x, perm=[1, 0, 2]), *weights, bias, view.lengths,
            *(context.op("Unsqueeze", state, direction) for state in past), **_attributes(view),
        )  # fmt: skip
        y = context.op("Squeeze", outputs[0], context.const([1]))  # (time, batch, hidden)
        present = [context.op("Squeeze", state, direction) for state in outputs[1:]]
        return [context.op("Transpose", y, perm=[1, 0, 2]), *present]

    return dict.fromkeys(_GATES, rule)


def _attributes(view: View) -> dict[str, Any]:
    attributes: dict[str, Any] = {"hidden_size": shape_of(view.w_hh)[1]}
    if view.op is RNN:
        attributes["activations"] = [view.activation.capitalize()]
    if view.op is GRU:
        attributes["linear_before_reset"] = 1
    return attributes


def reorder(array: Array, order: Sequence[int]) -> Array:
    """Gates along the first axis, in another order."""
    gates = array.reshape(len(order), -1, *array.shape[1:])
    return gates[list(order)].reshape(array.shape)


def _kept_as(context: Lowering, weight: ir.Value) -> tuple[Scheme | None, int]:
    """A weight's scheme, None for floats, and how many numbers it has."""
    quantized = context.quantized(weight)
    return None if quantized is None else quantized.scheme, math.prod(shape_of(weight))


def _one_direction(context: Lowering, weight: ir.Value, order: Sequence[int]) -> ir.Value:
    quantized = context.quantized(weight)
    if quantized is not None:
        return _widened(context, weight, quantized, order)
    return context.derived(weight, "onnx", lambda w: reorder(w, order)[None], blank(weight, (1, *shape_of(weight))))


def _widened(context: Lowering, weight: ir.Value, quantized: QuantizedWeight, order: Sequence[int]) -> ir.Value:
    """(1, rows, columns) in float, from codes with gates in ONNX's order; DequantizeLinear would not be folded."""
    (rows, columns), blocks, middle = quantized.shape, quantized.blocks, quantized.scheme.middle

    def part(suffix: str, make: Callable[[Codes], Array], dtype: Any, *shape: int) -> ir.Value:
        like = np.broadcast_to(np.zeros((), dtype), (rows, *shape))
        lazy = quantized.lazy(lambda c: reorder(make(c).astype(dtype).reshape(rows, *shape), order), like)
        return context.op("Cast", context.part(weight, suffix, lazy), to=ir.DataType.FLOAT)

    wide = part("onnx.codes", lambda c: c.codes.astype(np.int16) - middle, np.int8, blocks, columns // blocks)
    if not quantized.scheme.symmetric:
        zeros = part("onnx.zeros", lambda c: c.zeros.astype(np.int16) - middle, np.int8, blocks, 1)
        wide = context.op("Sub", wide, zeros)
    wide = context.op("Mul", wide, part("onnx.scales", lambda c: c.scales, np.float16, blocks, 1))
    return context.op("Reshape", wide, context.const([1, rows, columns]))


def _bias(context: Lowering, b_ih: ir.Value, b_hh: ir.Value, order: Sequence[int]) -> ir.Value:
    assert b_hh.const_value is not None
    other, like = b_hh.const_value, blank(b_ih, (1, 2 * shape_of(b_ih)[0]))
    return context.derived(
        b_ih, "onnx", lambda b: np.concatenate([reorder(b, order), reorder(other.numpy(), order)])[None], like
    )
