"""A loop over one token is the token's step: what an engine's decoding graph has no need of a loop for."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["UnrollSingleSteps"]


class UnrollSingleSteps(ir.passes.InPlacePass):
    """``Scan`` over the tokens of a step becomes its body, once.

    Before: a captured graph whose steps have one token a row; its loops go along the first axis of what they read, the
    size of which is 1 or the free size ``time``. After: none of these loops is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Unroll every one, in place."""
        found = [node for node in model.graph if _is_over_one_token(node)]
        for node in found:
            _unroll(model.graph, node)
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No such loop is left."""
        if left := [node for node in model.graph if _is_over_one_token(node)]:
            raise ir.passes.PostconditionError(f"the loop that gives {left[0].outputs[0].name} is still one")


def _is_over_one_token(node: ir.Node) -> bool:
    if node.op_type != "Scan" or node.domain != "" or {*node.attributes} != {"body", "num_scan_inputs"}:
        return False
    rows = node.inputs[-node.attributes["num_scan_inputs"].as_int() :]
    first = {str(row.shape[0]) if row is not None and row.shape is not None else "" for row in rows}
    return first <= {"time", "1"}


def _unroll(graph: ir.Graph, node: ir.Node) -> None:
    body, prefix = node.attributes["body"].as_graph(), node.outputs[0].name
    count = node.attributes["num_scan_inputs"].as_int()
    states = len(node.inputs) - count
    axis = ir.Value(
        name=f"{prefix}.axis", const_value=ir.tensor([0], dtype=ir.DataType.INT64), shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
    )  # fmt: skip
    graph.register_initializer(axis)
    before: list[ir.Node] = []
    after: list[ir.Node] = []
    new: list[ir.Value] = []
    for number, (inside, given) in enumerate(zip(body.inputs, node.inputs, strict=True)):
        value = given
        if number >= states:
            squeeze = ir.node("Squeeze", [given, axis])
            value = _like(squeeze.outputs[0], inside, f"{prefix}.row{number}")
            before.append(squeeze)
        assert value is not None
        ir.convenience.replace_all_uses_with(inside, value)
    outputs, nodes = list(body.outputs), list(body)
    body.outputs.clear()
    body.remove(nodes)
    for number, value in enumerate(v for inner in nodes for v in inner.outputs):
        value.name = f"{prefix}/{number}"
    for value, old in zip(outputs, node.outputs, strict=True):
        if len(new) >= states:
            unsqueeze = ir.node("Unsqueeze", [value, axis])
            after.append(unsqueeze)
            value = unsqueeze.outputs[0]
        new.append(_like(value, old))
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*before, *nodes, *after], node.outputs, new)


def _like(value: ir.Value, other: ir.Value, name: str = "") -> ir.Value:
    value.type, value.shape = other.type, other.shape
    value.name = name or value.name
    return value
