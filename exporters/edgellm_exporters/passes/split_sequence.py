"""Parts of a tensor as outputs of one Split instead of members of a sequence, which engines know nothing of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["SplitSequence"]


class SplitSequence(ir.passes.InPlacePass):
    """``SplitToSequence -> SequenceAt`` becomes ``Split``; tracing makes the former of ``torch.split`` and ``chunk``.

    Before: a captured graph. After: every sequence whose parts have known sizes, and of which only known members are
    read, is gone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every one, in place."""
        changed = False
        for node in list(model.graph):
            known = _known_parts(node)
            if known is not None:
                _replace(model.graph, node, *known)
                changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No sequence of known parts is left."""
        if left := [node for node in model.graph if _known_parts(node) is not None]:
            raise ir.passes.PostconditionError(f"the sequence {left[0].outputs[0].name} is still one")


def _known_parts(node: ir.Node) -> tuple[list[int], list[int]] | None:
    """Which members are read and how long each part is, of a sequence that is known so far."""
    if node.op_type != "SplitToSequence" or node.domain != "":
        return None
    readers = [user for user, _ in node.outputs[0].uses()]
    members = [_number(reader.inputs[1]) if reader.op_type == "SequenceAt" else None for reader in readers]
    keepdims, sizes = node.attributes.get("keepdims"), _sizes(node)
    if sizes is None or node.outputs[0].is_graph_output():
        return None
    if len(node.inputs) < 2 and keepdims is not None and not keepdims.as_int():
        return None  # its members have an axis less
    found = [member for member in members if member is not None]
    return (found, sizes) if len(found) == len(members) else None


def _replace(graph: ir.Graph, node: ir.Node, members: list[int], sizes: list[int]) -> None:
    readers = [user for user, _ in node.outputs[0].uses()]
    value = ir.Value(
        name=f"{node.outputs[0].name}.sizes", const_value=ir.tensor(np.array(sizes, dtype=np.int64)),
        shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64),
    )  # fmt: skip
    graph.register_initializer(value)
    split = ir.node("Split", [node.inputs[0], value], num_outputs=len(sizes), attributes={"axis": _axis(node)})
    old = [reader.outputs[0] for reader in readers]
    new = [split.outputs[member] for member in members]
    for before, after in zip(old, new, strict=True):
        after.type, after.shape = before.type, before.shape
    ir.convenience.replace_nodes_and_values(graph, node, [*readers, node], [split], old, new)


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _sizes(node: ir.Node) -> list[int] | None:
    """Of the parts, where they are known."""
    x, given = node.inputs[0], _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None:
        return None
    if given.ndim == 1:
        return [int(size) for size in given]
    whole = x.shape[_axis(node)] if x is not None and x.shape is not None else None
    if not isinstance(whole, int):
        return None
    size = int(given)
    return [min(size, whole - start) for start in range(0, whole, size)]


def _number(value: ir.Value | None) -> int | None:
    found = _constant(value)
    return None if found is None else int(found.reshape(()))


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
        return None
    return producer.attributes["value"].as_tensor().numpy()
