"""Ops that compute in float32 inside a narrower graph, because a target has no kernel of theirs that is
narrower, or a narrower one would lose what they sum.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from edgellm_exporters.lowering.precision import FLOATS

__all__ = ["compute_in_float32"]


def compute_in_float32(model: ir.Model, ops: Collection[str], dtype: str) -> None:
    """Put casts around every node of these ops, so that it reads and gives float32. In place.

    Before: a graph narrowed to ``dtype``. After: the same values around the nodes, in the same dtype; their weights are
    widened when the graph is loaded.

    Args:
        model: whose main graph is changed.
        ops: names of ops, or of those with a reduction.
        dtype: that of the graph.
    """
    for node in [n for n in model.graph if n.op_type in ops or _with_reduction(n) in ops]:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (None, FLOATS[dtype]):  # None: what another node makes
                cast = _cast(value, ir.DataType.FLOAT)
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            uses = list(value.uses())
            value.type = ir.TensorType(ir.DataType.FLOAT)
            cast = _cast(value, FLOATS[dtype])
            model.graph.insert_after(node, cast)
            for user, index in uses:
                user.replace_input_with(index, cast.outputs[0])
            if value.is_graph_output():
                name, value.name = value.name, f"{value.name}.wide"
                cast.outputs[0].name = name
                model.graph.outputs[model.graph.outputs.index(value)] = cast.outputs[0]


def _with_reduction(node: ir.Node) -> str:
    reduction = node.attributes.get("reduction")
    return "" if reduction is None else f"{node.op_type} {reduction.as_string()}"


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    return cast
