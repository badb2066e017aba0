"""Recurrences in graphs of fixed sizes, as cells written out: once for a decoding step, in a Scan for a prompt.

ONNX's own LSTM, GRU and RNN would save nothing, for TensorRT makes loops of them too, and with 16-bit floats and the
rows' lengths neither library takes them: TensorRT mixes types in its mask, ONNX Runtime ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

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

    def rule(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
        states = 2 if node.op_type == "LSTM" else 1
        if len(node.inputs) < states + 6 or node.inputs[states + 5] is None:
            raise LoweringError(f"{node.op_type} was called without lengths; pass step.lengths to edgellm.ops")
        if context.fixed.role == DECODE:
            return _one_token(context, node, matmul, states)
        return scan(context, node, matmul, hoist)

    return dict.fromkeys(CELLS, rule)


def _one_token(context: Lowering, node: ir.Node, matmul: MatMul, states: int) -> Sequence[ir.Value]:
    """The cell, once: x (batch, 1, features) to y (batch, 1, hidden) and the new state."""
    x, *rest = node.inputs
    past, (w_ih, w_hh, b_ih, b_hh) = [s for s in rest[:states] if s is not None], rest[states : states + 4]
    assert x is not None and w_ih is not None and w_hh is not None
    time = context.const([1])
    gates_x = matmul(context, context.op("Squeeze", x, time), w_ih, b_ih)  # (batch, gates * hidden)
    gates_h = matmul(context, past[0], w_hh, b_hh)
    new = CELLS[node.op_type](context, node, gates_x, gates_h, past)
    return [context.op("Unsqueeze", new[0], time), *new]
