"""Projections of one tensor in one product: query, key and value; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgellm.ops.canonical import DOMAIN

__all__ = ["MergeLinears", "parts_of"]


class MergeLinears(ir.passes.InPlacePass):
    """Linears that read the same tensor become one Linear followed by a Split.

    Before: canonical graph whose weights are initializers. After: no two Linears read the same tensor, unless a weight
    is used elsewhere too or only some have a bias. Rows of a weight are quantized on their own, so merging changes no
    number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge every group, in place."""
        groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if node.op_type == "Linear" and node.domain == DOMAIN and _mergeable(node):
                assert node.inputs[0] is not None
                groups[node.inputs[0]].append(node)
        changed = False
        for x, nodes in groups.items():
            if len(nodes) > 1 and len({_has_bias(n) for n in nodes}) == 1:
                _merge(model.graph, x, nodes)
                changed = True
        return ir.passes.PassResult(model, changed)


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _mergeable(node: ir.Node) -> bool:
    return all(v is not None and v.const_value is not None and len(v.uses()) == 1 for v in node.inputs[1:] if v)


def _merge(graph: ir.Graph, x: ir.Value, nodes: Sequence[ir.Node]) -> None:
    columns = range(1, 3 if _has_bias(nodes[0]) else 2)
    inputs = [_concatenated(graph, [_weight(node, i) for node in nodes]) for i in columns]
    sizes = [_tensor(_weight(node, 1)).shape.numpy()[0] for node in nodes]
    merged = ir.node("Linear", [x, *inputs], domain=DOMAIN)
    outer = list(x.shape)[:-1] if x.shape is not None else []
    merged.outputs[0].shape, merged.outputs[0].type = ir.Shape([*outer, sum(sizes)]), x.type
    lengths = _initializer(graph, f"{inputs[0].name}.sizes", ir.tensor(np.array(sizes, dtype=np.int64)))
    split = ir.node("Split", [merged.outputs[0], lengths], num_outputs=len(nodes), attributes={"axis": -1})
    old = [node.outputs[0] for node in nodes]
    first = nodes[0]  # all read x, so what the first could compute, the merged one can
    ir.convenience.replace_nodes_and_values(graph, first, nodes, [merged, split], old, split.outputs)


def _weight(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _concatenated(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
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
