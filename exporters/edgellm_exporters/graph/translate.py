"""From a traced program of canonical nodes to a graph, in a hundredth of the time that PyTorch's ONNX exporter takes.

It knows a handful of PyTorch's own operators, those that a language model of canonical ops is left with. For a program
with any other, :func:`translated` gives nothing, and PyTorch's exporter does the work; a test holds the two together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch
from torch.export.graph_signature import InputKind

from edgellm.ops.canonical import DOMAIN

__all__ = ["translated"]

_Form = Callable[["_Translation", torch.fx.Node], ir.Value | None]
_IR_VERSION = 10
_EMITTED = "onnx_symbolic::_symbolic_multi_out"  # what edgellm.ops.canonical.emit leaves
_SOURCES = {"i": "attr_ints", "f": "attr_floats", "s": "attr_strs"}  # by the first letter of an attribute's type


def translated(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], *, opset: int
) -> ir.Model | None:
    """The program as a graph, its weights named as in the traced module; None if it has an operator unknown here.

    Args:
        program: traced.
        inputs: names of the graph's inputs.
        outputs: names of its outputs.
        opset: of the plain ONNX operators.
    """
    made = _Translation(program, inputs)
    for node in program.graph.nodes:
        if node.op == "call_function" and not made.add(node):
            return None
    results = [made.values.get(node) for node in program.graph.output_node().args[0]]
    given = [value for value in results if value is not None]
    if len(given) != len(results) or len({id(v) for v in given}) != len(given):
        return None  # an output that is no tensor, or one under two names
    if any(value.is_graph_input() or value.is_initializer() for value in given):
        return None
    for value, name in zip(given, outputs, strict=True):
        value.name = name
    graph = ir.Graph(
        made.inputs, given, nodes=made.nodes, initializers=made.initializers, name="main_graph",
        opset_imports={"": opset, DOMAIN: 1},
    )  # fmt: skip
    return ir.Model(graph, ir_version=_IR_VERSION)


class _Translation:
    """The values and nodes of a graph in the making.

    Args:
        program: traced.
        names: of its inputs.
    """

    def __init__(self, program: torch.export.ExportedProgram, names: Sequence[str]) -> None:
        self.values: dict[Any, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self._several: dict[Any, Sequence[ir.Value]] = {}  # a node's outputs, where it gives a list of them
        rest = iter(names)
        tensors: Mapping[str, Any] = {**program.state_dict, **program.constants}
        for node, spec in zip(_placeholders(program), program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self.inputs.append(_value(next(rest), node.meta["val"]))
                self.values[node] = self.inputs[-1]
            elif node.users:
                assert spec.target is not None
                value = _value(spec.target, node.meta["val"])
                value.const_value = ir.tensor_adapters.TorchTensor(tensors[spec.target].detach(), name=spec.target)
                self.initializers.append(value)
                self.values[node] = value

    def add(self, node: torch.fx.Node) -> bool:
        """One call of a function; False if it is not known."""
        if node.target is operator.getitem:
            source, index = node.args
            if source not in self._several or not isinstance(index, int):
                return False
            self.values[node] = self._several[source][index]
            self.values[node].name = node.name
            return True
        if node.target is torch.ops.aten.sym_size.int:  # only shapes of values ask for it, and they have them
            return all(_is_emitted(user) for user in node.users)
        if _is_emitted(node):
            return self._add_emitted(node)
        form = _FORMS.get(node.target)
        made = form(self, node) if form is not None and not node.kwargs else None
        if made is None:
            return False
        self.values[node] = made
        return True

    def tensors(self, node: torch.fx.Node) -> list[ir.Value] | None:
        """What a node takes, if that is tensors of the dtype that it gives; else None."""
        dtype = node.meta["val"].dtype
        fits = all(
            isinstance(x, torch.fx.Node) and x in self.values and x.meta["val"].dtype == dtype for x in node.args
        )
        return [self.values[x] for x in node.args] if fits else None

    def op(self, kind: str, inputs: Sequence[ir.Value], like: torch.fx.Node, name: str) -> ir.Value:
        """A plain ONNX node with one output, of the shape that a traced node has."""
        value = _value(name, like.meta["val"])
        self.nodes.append(ir.Node("", kind, inputs, outputs=[value]))
        return value

    def _add_emitted(self, node: torch.fx.Node) -> bool:
        inputs, kind, _ = node.args
        more: Mapping[str, Any] = node.kwargs
        assert isinstance(inputs, Sequence)
        if more.get("domain") != DOMAIN or not all(x is None or x in self.values for x in inputs):
            return False
        outputs = [_value(f"{node.name}_{i}", val) for i, val in enumerate(node.meta["val"])]
        self._several[node] = outputs
        given = [None if x is None else self.values[x] for x in inputs]
        self.nodes.append(ir.Node(DOMAIN, str(kind), given, _attributes(more), outputs=outputs))
        return True


def _attributes(encoded: Mapping[str, Any]) -> Iterator[ir.Attr]:
    for key, kind, span in zip(encoded["attr_keys"], encoded["attr_types"], encoded["attr_pos"], strict=True):
        found = list(encoded[_SOURCES[kind[0]]][slice(*span)])
        yield ir.convenience.convert_attribute(key, found if len(kind) > 1 else found[0])


def _elementwise(kind: str) -> _Form:
    def form(made: _Translation, node: torch.fx.Node) -> ir.Value | None:
        operands = made.tensors(node)
        return None if operands is None else made.op(kind, operands, node, node.name)

    return form


def _silu(made: _Translation, node: torch.fx.Node) -> ir.Value | None:
    operands = made.tensors(node)
    if operands is None:
        return None
    (x,) = operands
    return made.op("Mul", [x, made.op("Sigmoid", [x], node, f"{node.name}_gate")], node, node.name)


def _dropout(made: _Translation, node: torch.fx.Node) -> ir.Value | None:
    x, _, training = node.args
    return None if training else made.values.get(x)


_FORMS: Mapping[Any, _Form] = {
    torch.ops.aten.add.Tensor: _elementwise("Add"),
    torch.ops.aten.mul.Tensor: _elementwise("Mul"),
    torch.ops.aten.silu.default: _silu,
    torch.ops.aten.dropout.default: _dropout,
}


def _is_emitted(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "_name", "") == _EMITTED


def _placeholders(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def _value(name: str, like: Any) -> ir.Value:
    """A value of a traced tensor's dtype and shape; free sizes keep the tracer's names."""
    shape = ir.Shape([size if isinstance(size, int) else str(size) for size in like.shape])
    dtype = ir.tensor_adapters.from_torch_dtype(like.dtype)
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
