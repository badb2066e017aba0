"""Ops that compute in float32 inside a narrower graph, because a target has no kernel of theirs that is narrower."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir

__all__ = ["widen"]

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def widen(model: ir.Model, ops: Set[str]) -> None:
    """Put casts around every node of these ops, so that it reads and gives float32. In place.

    Before: a narrowed graph. After: the same values around the nodes, in the same dtypes; their weights are widened when
    the graph is loaded.

    Args:
        model: whose main graph is changed.
        ops: names of ops in ONNX's own domain.
    """
    for node in [n for n in model.graph if n.op_type in ops and not n.domain]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _NARROW:
                cast = _cast(value, ir.DataType.FLOAT)
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            if value.dtype not in _NARROW:
                continue
            narrow = value.dtype
            uses = [(user, index) for user, index in value.uses()]
            value.type = ir.TensorType(ir.DataType.FLOAT)
            cast = _cast(value, narrow)
            model.graph.insert_after(node, cast)
            for user, index in uses:
                user.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    return cast
