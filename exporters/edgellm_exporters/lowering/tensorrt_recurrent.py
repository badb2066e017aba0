"""Recurrences in graphs of fixed sizes, as cells written out: once for a decoding step, in a Scan for a prompt.

ONNX's own LSTM, GRU and RNN would save nothing, for TensorRT makes loops of them too, and with 16-bit floats and the
rows' lengths neither library takes them: TensorRT mixes types in its mask, ONNX Runtime ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering.context import Lowering, Rule
from edgellm_exporters.lowering.fixed_form import DECODE
from edgellm_exporters.lowering.scan import CELLS, Hoist, MatMul, scan

__all__ = ["rules"]


def rules(matmul: MatMul, hoist: Hoist) -> Mapping[str, Rule]:
    """Rules for RNN, LSTM and GRU.

    Args:
        matmul: the target's product with a weight, quantized or not.
        hoist: prepares a weight for ``matmul`` outside the loop over tokens.
    """

    def rule(context: Lowering, view: View) -> Sequence[ir.Value]:
        if view.lengths is None:
            raise LoweringError(f"{view.op.name} was called without lengths; pass step.lengths to edgellm.ops")
        if context.fixed.role == DECODE:  # of a decoding step every token is valid
            return _one_token(context, view, matmul)
        return scan(context, view, matmul, hoist)

    return dict.fromkeys(CELLS, rule)


def _one_token(context: Lowering, view: View, matmul: MatMul) -> Sequence[ir.Value]:
    """The cell, once: x (batch, 1, features) to y (batch, 1, hidden) and the new state."""
    past, time = view.all(view.op.states), context.const([1])
    gates_x = matmul(context, context.op("Squeeze", view.x, time), view.w_ih, view.b_ih)  # (batch, gates * hidden)
    gates_h = matmul(context, past[0], view.w_hh, view.b_hh)
    new = CELLS[view.op.name](context, view, gates_x, gates_h, past)
    return [context.op("Unsqueeze", new[0], time), *new]
