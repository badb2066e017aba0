"""A recurrence with quantized weights: the input product over the whole chunk at once, then a Scan over the cell.

The cells are those of ``edgellm.ops.recurrence``, gate for gate in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.lowering.context import Lowering, shape_of

__all__ = ["CELLS", "Hoist", "MatMul", "scan"]

MatMul = Callable[[Lowering, ir.Value, ir.Value, ir.Value | None], ir.Value]
Hoist = Callable[[Lowering, ir.Value], object]


def scan(context: Lowering, view: View, matmul: MatMul, hoist: Hoist) -> Sequence[ir.Value]:
    """Lower RNN, LSTM or GRU; gives y (batch, time, hidden) and the new state."""
    past = view.all(view.op.states)
    gates_x = matmul(context, view.x, view.w_ih, view.b_ih)  # (batch, time, gates * hidden)
    gates_x = context.op("Transpose", gates_x, perm=[1, 0, 2])
    hoist(context, view.w_hh)  # what can be done once for the chunk is not done at every token
    body, valid = _body(context, view, matmul, past), _valid(context, view.lengths)
    *present, y = context.ops(len(past) + 1, "Scan", *past, gates_x, valid, body=body, num_scan_inputs=2)
    return [context.op("Transpose", y, perm=[1, 0, 2]), *present]


def _valid(context: Lowering, lengths: ir.Value) -> ir.Value:
    """Which tokens are not padding, (time, batch, 1)."""

    def make() -> ir.Value:
        time = context.time()
        steps = context.op("Range", context.const(0), context.op("Squeeze", time, context.const([0])), context.const(1))
        columns = context.op("Unsqueeze", steps, context.const([1, 2]))
        count = context.op("Cast", context.op("Unsqueeze", lengths, context.const([0, 2])), to=ir.DataType.INT64)
        return context.op("Less", columns, count)

    return context.once(("valid", lengths), make)


def _body(context: Lowering, view: View, matmul: MatMul, past: Sequence[ir.Value]) -> ir.Graph:
    """The cell as a graph: (states, gates_x, valid) to (states, y)."""
    dtype = past[0].dtype
    rows, hidden = shape_of(view.w_hh)
    prefix = view.y.name
    states = [_value(f"{prefix}.past{i}", dtype, ["batch", hidden]) for i in range(len(past))]
    gates_x = _value(f"{prefix}.gates", dtype, ["batch", rows])
    valid = _value(f"{prefix}.valid", ir.DataType.BOOL, ["batch", 1])
    outer = context.take_nodes()  # what came before belongs to the outer graph
    gates_h = matmul(context, states[0], view.w_hh, view.b_hh)
    new = CELLS[view.op.name](context, view, gates_x, gates_h, states)
    kept = [context.op("Where", valid, n, s) for n, s in zip(new, states, strict=True)]
    y = context.op("Identity", new[0])
    nodes = context.take_nodes()
    context.put_back(outer)
    for number, value in enumerate(v for n in nodes for v in n.outputs):
        value.name = f"{prefix}.{number}"  # names in a body must differ from those of the graph around it
    assert dtype is not None
    for value in (*kept, y):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(["batch", hidden])
    return ir.Graph([*states, gates_x, valid], [*kept, y], nodes=nodes, name=f"{view.op.name.lower()}_cell")


def _value(name: str, dtype: ir.DataType | None, shape: Sequence[int | str]) -> ir.Value:
    assert dtype is not None
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _rnn(
    context: Lowering, view: View, gates_x: ir.Value, gates_h: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    activation = view.activation.capitalize()
    return [context.op(activation, context.op("Add", gates_x, gates_h))]


def _lstm(
    context: Lowering, view: View, gates_x: ir.Value, gates_h: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    split = context.ops(4, "Split", context.op("Add", gates_x, gates_h), axis=-1, num_outputs=4)
    i, f, o = (context.op("Sigmoid", split[n]) for n in (0, 1, 3))
    g = context.op("Tanh", split[2])
    c = context.op("Add", context.op("Mul", f, states[1]), context.op("Mul", i, g))
    return [context.op("Mul", o, context.op("Tanh", c)), c]


def _gru(
    context: Lowering, view: View, gates_x: ir.Value, gates_h: ir.Value, states: Sequence[ir.Value]
) -> list[ir.Value]:
    rx, zx, nx = context.ops(3, "Split", gates_x, axis=-1, num_outputs=3)
    rh, zh, nh = context.ops(3, "Split", gates_h, axis=-1, num_outputs=3)
    r, z = context.op("Sigmoid", context.op("Add", rx, rh)), context.op("Sigmoid", context.op("Add", zx, zh))
    n = context.op("Tanh", context.op("Add", nx, context.op("Mul", r, nh)))
    # (1 - z) n + z h, as one difference less
    return [context.op("Add", n, context.op("Mul", z, context.op("Sub", states[0], n)))]


CELLS: dict[str, Callable[..., list[ir.Value]]] = {"RNN": _rnn, "LSTM": _lstm, "GRU": _gru}
