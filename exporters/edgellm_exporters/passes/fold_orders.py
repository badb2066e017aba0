"""Features that a linear layer gives and that are then put in another order: the rows of its weight in that order."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgellm.ops import LINEAR
from edgellm.ops.schema import View, view_of

__all__ = ["FoldOrders"]


class FoldOrders(ir.passes.InPlacePass):
    """``Linear -> Gather`` of all features in a known order becomes Linear with its weight and bias in that order.

    Such orders come with rotations of neighbouring features, which attention has inside as rotations of two halves.
    Before: a captured graph. After: no Gather takes the features of a Linear that nothing else reads; weights and
    biases are read through Gathers, which fold into constants.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every order, in place."""
        changed = False
        for node in list(model.graph):
            linear, order = _linear_of(node), node.inputs[1] if len(node.inputs) > 1 else None
            if linear is None or order is None:
                continue
            made = [None if x is None else _rows(x, order) for x in (linear.weight, linear.bias)]
            weight, bias = (None if gather is None else gather.outputs[0] for gather in made)
            new = LINEAR.node(ir.node, x=linear.x, weight=weight, bias=bias)
            new.outputs[0].shape, new.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            nodes = [gather for gather in made if gather is not None]
            ir.convenience.replace_nodes_and_values(  # where the layer was, beside others of its input
                model.graph, linear.node, [node, linear.node], [*nodes, new], node.outputs, new.outputs
            )
            changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No order of a linear layer's features is left."""
        for node in model.graph:
            if _linear_of(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} orders what a linear layer could give in order")


def _linear_of(node: ir.Node) -> View | None:
    """The layer whose features a Gather puts in another order."""
    if node.domain or node.op_type != "Gather" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    features, order = node.inputs[0], node.inputs[1].const_value
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if order is None or features.shape is None or axis not in (-1, len(features.shape) - 1):
        return None
    linear = view_of(features.producer())
    if linear is None or linear.op is not LINEAR or len(features.uses()) != 1 or features.is_graph_output():
        return None
    weight = linear.weight
    if weight.const_value is None or (linear.bias is not None and linear.bias.const_value is None):
        return None
    rows = np.sort(np.asarray(order.numpy()).ravel())
    return linear if np.array_equal(rows, np.arange(weight.const_value.shape[0])) and len(order.shape) == 1 else None


def _rows(weight: ir.Value, order: ir.Value) -> ir.Node:
    gather = ir.node("Gather", [weight, order], {"axis": 0})
    gather.outputs[0].shape, gather.outputs[0].type = weight.shape, weight.type
    return gather
