"""Projections of one tensor in one product: query, key and value; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgellm.ops import LINEAR
from edgellm.ops.schema import View, views

__all__ = ["MergeLinears", "concatenated", "mergeable", "parts_of"]


class MergeLinears(ir.passes.InPlacePass):
    """Linears that read the same tensor become one Linear followed by a Split.

    Before: canonical graph whose weights are initializers. After: no two Linears read the same tensor, unless a weight
    is used elsewhere too or only some have a bias. Rows of a weight are quantized on their own, so merging changes no
    number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge every group, in place."""
        groups = _groups(model)
        for linears in groups:
            _merge(model.graph, [LINEAR.of(linear.node) for linear in linears])  # as earlier merges left them
        return ir.passes.PassResult(model, bool(groups))

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left to merge."""
        if left := _groups(model):
            raise ir.passes.PostconditionError(f"{left[0][0].weight.name} could be merged and was not")


def _groups(model: ir.Model) -> list[list[View]]:
    """Linears that can become one."""
    readers: dict[ir.Value, list[View]] = defaultdict(list)
    for view in views(model.graph, LINEAR):
        if all(map(mergeable, (view.weight, view.bias))):
            readers[view.x].append(view)
    return [found for found in readers.values() if len(found) > 1 and len({v.bias is None for v in found}) == 1]


def mergeable(value: ir.Value | None) -> bool:
    """Whether a weight, if there is one, is known and read once."""
    return value is None or (value.const_value is not None and len(value.uses()) == 1)


def _merge(graph: ir.Graph, linears: Sequence[View]) -> None:
    x = linears[0].x
    weight = concatenated(graph, [linear.weight for linear in linears])
    bias = None if linears[0].bias is None else concatenated(graph, [linear.bias for linear in linears])
    sizes = [_tensor(linear.weight).shape.numpy()[0] for linear in linears]
    merged = LINEAR.node(ir.node, x=x, weight=weight, bias=bias)
    outer = list(x.shape)[:-1] if x.shape is not None else []
    merged.outputs[0].shape, merged.outputs[0].type = ir.Shape([*outer, sum(sizes)]), x.type
    lengths = _initializer(graph, f"{weight.name}.sizes", ir.tensor(np.array(sizes, dtype=np.int64)))
    split = ir.node("Split", [merged.outputs[0], lengths], num_outputs=len(linears), attributes={"axis": -1})
    old, nodes = [linear.y for linear in linears], [linear.node for linear in linears]
    first = nodes[0]  # all read x, so what the first could compute, the merged one can
    ir.convenience.replace_nodes_and_values(graph, first, nodes, [merged, split], old, split.outputs)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def concatenated(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """An initializer with the rows of some others, in their order."""
    tensors = [_tensor(v) for v in values]
    rows, first = sum(t.shape.numpy()[0] for t in tensors), tensors[0]
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([t.numpy() for t in tensors])),
        dtype=first.dtype,
        shape=ir.Shape([rows, *first.shape.numpy()[1:]]),
    )
    return _initializer(graph, _joined([v.name or "" for v in values]), lazy)


def _joined(names: Sequence[str]) -> str:
    """``a.q.weight``, ``a.k.weight`` to ``a.q+k.weight``."""
    split = [name.rsplit(".", 2) for name in names]
    if any(len(s) != 3 or (s[0], s[2]) != (split[0][0], split[0][2]) for s in split):
        return "+".join(names)
    return f"{split[0][0]}.{'+'.join(s[1] for s in split)}.{split[0][2]}"


def parts_of(name: str) -> list[str]:
    """The names of the weights that a name of this pass's making stands for; of any other, the name itself."""
    head, _, last = name.rpartition(".")
    prefix, dot, middle = head.rpartition(".")
    return [f"{prefix}{dot}{part}.{last}" for part in middle.split("+")] if "+" in middle else name.split("+")


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
