"""Projections of one tensor in one product: query, key and value; gate and up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgellm.ops.canonical import DOMAIN

__all__ = ["MergeLinears"]


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
    sizes = [node.inputs[1].shape[0] for node in nodes]
    inputs = [_concatenated(graph, [n.inputs[i] for n in nodes]) for i in range(1, 3 if _has_bias(nodes[0]) else 2)]
    merged = ir.node("Linear", [x, *inputs], domain=DOMAIN)
    shape = ir.Shape([*x.shape[:-1], sum(sizes)])
    merged.outputs[0].shape, merged.outputs[0].type = shape, x.type
    lengths = _initializer(graph, f"{inputs[0].name}.sizes", ir.tensor(np.array(sizes, dtype=np.int64)))
    split = ir.node("Split", [merged.outputs[0], lengths], num_outputs=len(nodes), attributes={"axis": -1})
    old = [node.outputs[0] for node in nodes]
    first = nodes[0]  # all read x, so what the first could compute, the merged one can
    ir.convenience.replace_nodes_and_values(graph, first, nodes, [merged, split], old, split.outputs)


def _concatenated(graph: ir.Graph, parts: Sequence[ir.Value | None]) -> ir.Value:
    values = [p for p in parts if p is not None]
    tensors = [v.const_value for v in values]
    rows = sum(t.shape[0] for t in tensors)
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([t.numpy() for t in tensors if t is not None])),
        dtype=tensors[0].dtype, shape=ir.Shape([rows, *tensors[0].shape[1:]]),
    )  # fmt: skip
    return _initializer(graph, _joined([v.name or "" for v in values]), lazy)


def _joined(names: Sequence[str]) -> str:
    """``a.q.weight``, ``a.k.weight`` to ``a.q+k.weight``."""
    split = [name.rsplit(".", 2) for name in names]
    if any(len(s) != 3 or (s[0], s[2]) != (split[0][0], split[0][2]) for s in split):
        return "+".join(names)
    return f"{split[0][0]}.{'+'.join(s[1] for s in split)}.{split[0][2]}"


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
