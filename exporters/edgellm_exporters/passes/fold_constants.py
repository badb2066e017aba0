"""What a graph computes from constants alone becomes a constant: gains such as 1 + w, slices, weights by parts.

Weights are not read here: what is computed from one is computed when the graph is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

__all__ = ["FoldConstants"]

_SMALL = 1 << 16  # bytes of constants that are computed straight away
_LARGEST = 2  # times what it is made of, at most: a constant that was spread out stays spread out by a node
_CHANCE = ("Random", "Multinomial", "Bernoulli")  # how the names of operators begin that give other numbers each time
_PART = re.compile(r"(.*\.|)parametrizations\.(\w+)\.\w+")  # PyTorch's name for what a parametrized weight is made of


class FoldConstants(ir.passes.InPlacePass):
    """Nodes that read constants only are replaced by what they give.

    Before: a graph whose nodes are sorted. After: no plain ONNX node reads constants only, unless it gives an output of
    the graph, or more than twice what it reads, or what it gives has no shape. A constant that is made of weights has
    the name that the model gives the weight, where it is a parametrized one; otherwise the first weight's name and its
    own, between them a colon.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every constant, in place."""
        graph = model.graph
        constant: set[ir.Value] = set()
        for node in graph:
            if _is_constant(node, constant):
                constant.update(node.outputs)
        opset, changed = graph.opset_imports.get("", 1), False
        for value in [v for v in constant if _is_read(v, constant)]:
            tensor = _folded(value, opset)
            if tensor is not None:
                new = _initializer(graph, value, tensor)
                ir.convenience.replace_all_uses_with(value, new)
                changed = True
        if changed:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, changed)


def _is_constant(node: ir.Node, constant: set[ir.Value]) -> bool:
    graphs = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    if node.domain or graphs or node.op_type.startswith(_CHANCE):
        return False
    if node.op_type == "Shape":
        return _static_sizes(node) is not None
    return all(v is None or v in constant or _is_held(v) for v in node.inputs)


def _is_held(value: ir.Value) -> bool:
    return value.const_value is not None and value.producer() is None and not value.is_graph_input()


def _is_read(value: ir.Value, constant: set[ir.Value]) -> bool:
    """Whether something that is no constant reads it; an output of the graph keeps its node."""
    readers = [user.node for user in value.uses()]
    return not value.is_graph_output() and any(not set(node.outputs) <= constant for node in readers)


def _static_sizes(node: ir.Node) -> list[int] | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    start, end = (node.attributes[n].as_int() if n in node.attributes else None for n in ("start", "end"))
    sizes = list(shape)[start:end]
    return [int(s) for s in sizes] if all(isinstance(s, int) for s in sizes) else None  # type: ignore[arg-type]


def _folded(value: ir.Value, opset: int) -> ir.TensorProtocol | None:
    """What a value holds, or None to leave it to its node."""
    nodes, sources = _made_of(value)
    tensors = [source.const_value for source in sources]
    held = sum(t.nbytes for t in tensors if t is not None)
    compute = _Computation(value, nodes, sources, opset)
    if held <= _SMALL and not any(isinstance(t, ir.LazyTensor) for t in tensors):
        found = ir.tensor(compute())
        return found if found.nbytes <= _SMALL else None
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return None
    if value.shape.numpy() and np.prod(value.shape.numpy()) * value.dtype.itemsize > _LARGEST * held:
        return None
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(compute())), dtype=value.dtype, shape=ir.Shape(value.shape.numpy())
    )


def _made_of(value: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute a constant, in order, and the initializers that they read."""
    nodes: dict[ir.Node, None] = {}
    sources: dict[ir.Value, None] = {}

    def visit(each: ir.Value | None) -> None:
        if each is None:
            return
        node = each.producer()
        if node is None:
            sources[each] = None
        elif node not in nodes:
            for given in node.inputs if node.op_type != "Shape" else ():
                visit(given)
            nodes[node] = None

    visit(value)
    return list(nodes), list(sources)


class _Computation:
    """Computes a constant from what it is made of, each time that it is called.

    Args:
        value: the constant.
        nodes: that compute it, in order; they are written down, since passes will take them apart.
        sources: what these read.
        opset: of the nodes.
    """

    def __init__(
        self, value: ir.Value, nodes: Sequence[ir.Node], sources: Sequence[ir.Value], opset: int
    ) -> None:  # fmt: skip
        self._sizes = {str(n.outputs[0].name): _static_sizes(n) for n in nodes if n.op_type == "Shape"}
        self._nodes = [ir.to_proto(n) for n in nodes if n.op_type != "Shape"]
        self._tensors = {str(s.name): s.const_value for s in sources}
        self._name, self._opset = str(value.name), opset

    def __call__(self) -> NDArray[Any]:
        import onnx.helper
        import onnx.reference

        given: dict[str, NDArray[Any]] = {name: np.array(s, dtype=np.int64) for name, s in self._sizes.items()}
        given |= {name: np.asarray(tensor.numpy()) for name, tensor in self._tensors.items() if tensor is not None}
        if self._name in given:
            return given[self._name]
        inputs = [_typed(onnx.helper, name, array) for name, array in given.items()]
        outputs = [onnx.helper.make_empty_tensor_value_info(self._name)]
        graph = onnx.helper.make_graph(self._nodes, "constant", inputs, outputs)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        (found,) = onnx.reference.ReferenceEvaluator(model).run([self._name], given)
        return np.asarray(found)


def _typed(helper: Any, name: str, array: NDArray[Any]) -> Any:
    return helper.make_tensor_value_info(name, int(ir.DataType.from_numpy(array.dtype)), array.shape)


def _initializer(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    made = ir.Value(
        name=_name(value, graph.initializers), shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )  # fmt: skip
    graph.register_initializer(made)
    return made


def _name(value: ir.Value, taken: Mapping[str, Any]) -> str:
    weights = [str(s.name) for s in _made_of(value)[1] if isinstance(s.const_value, ir.LazyTensor)]
    if not weights:
        return str(value.name)
    parts = {_PART.sub(r"\1\2", name) if _PART.fullmatch(name) else "" for name in weights}
    whole = parts.pop() if len(parts) == 1 else ""
    return whole if whole and whole not in taken else f"{weights[0]}:{value.name}"
