"""A product with a turned weight is a Linear: x @ w.T, written by hand, is what nn.Linear computes."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops import LINEAR

__all__ = ["FindLinears"]


class FindLinears(ir.passes.InPlacePass):
    """MatMuls whose second side is the transpose of a weight (rows, columns) become Linears.

    Before: any captured graph. After: no such MatMul. It goes before constants are folded, which would turn the weight.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every one, in place."""
        changed = False
        for node in list(model.graph):
            weight = _turned(node)
            if weight is not None:
                x, y = node.inputs[0], node.outputs[0]
                linear = LINEAR.node(ir.node, x=x, weight=weight, bias=None)
                linear.outputs[0].shape, linear.outputs[0].type = y.shape, y.type
                ir.convenience.replace_nodes_and_values(model.graph, node, [node], [linear], [y], linear.outputs)
                changed = True
        return ir.passes.PassResult(model, changed)


def _turned(node: ir.Node) -> ir.Value | None:
    """The weight that a MatMul multiplies with by its rows."""
    if node.op_type != "MatMul" or node.domain or node.inputs[1] is None:
        return None
    turn = node.inputs[1].producer()
    if turn is None or turn.op_type != "Transpose" or turn.domain:
        return None
    weight = turn.inputs[0]
    perm = turn.attributes.get("perm")
    is_weight = weight is not None and weight.const_value is not None and weight.producer() is None
    if not is_weight or perm is None or list(perm.as_ints()) != [1, 0]:
        return None
    return weight
