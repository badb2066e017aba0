"""A weight that several products read is dequantized for each: TensorRT's builder ends on one that is shared."""

from __future__ import annotations

import onnx_ir as ir

from edgellm_exporters.quantize.plan import STORAGE

__all__ = ["SeparateDequantize"]


class SeparateDequantize(ir.passes.InPlacePass):
    """Gives every product of a ``DequantizeLinear`` but the first a copy of it, of codes and scales of its own.

    Before: a lowered graph, whose equal nodes were made one. After: no two ``MatMul`` read one ``DequantizeLinear`` of
    stored codes, nor two one stored tensor. In the file of weights the copies are one storage.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through every one, in place."""
        changed = False
        for node in list(model.graph.all_nodes()):
            for number, (product, index) in enumerate(_products(node)[1:], start=1):
                given = [_copied(model.graph, value, number) for value in node.inputs]
                copy = ir.node(node.op_type, given, attributes=dict(node.attributes))
                value, own = node.outputs[0], copy.outputs[0]
                own.name, own.type, own.shape = f"{value.name}.{number}", value.type, value.shape
                assert node.graph is not None
                node.graph.insert_after(node, copy)
                product.replace_input_with(index, own)
                changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Each has one product at most."""
        if left := [node for node in model.graph.all_nodes() if len(_products(node)) > 1]:
            raise ir.passes.PostconditionError(f"{left[0].outputs[0].name} is read by several products")


def _products(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The products that read what a node makes of stored codes."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return []
    return [(user, index) for user, index in node.outputs[0].uses() if user.op_type == "MatMul"]


def _copied(graph: ir.Graph, value: ir.Value | None, number: int) -> ir.Value | None:
    """A stored tensor under another name, its bytes those of the first."""
    if value is None or value.const_value is None or value.name not in graph.initializers:
        return value
    name, tensor = f"{value.name}.{number}", value.const_value
    if name not in graph.initializers:
        storage = tensor.metadata_props.setdefault(STORAGE, str(value.name))
        same = ir.LazyTensor(
            lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name,
            metadata_props={STORAGE: storage},
        )  # fmt: skip
        graph.register_initializer(ir.Value(name=name, const_value=same, shape=value.shape, type=value.type))
    return graph.initializers[name]
