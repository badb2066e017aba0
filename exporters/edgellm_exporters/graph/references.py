"""Ops that a target has no rule for, as the graph of their reference: what every op can be, wherever it was defined.

A reference is traced once for each distinct set of inputs and attributes. Free sizes stay free, and what is canonical
within it stays so, so that its matrices are smoothed and quantized as a model's are.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch
from torch import Tensor, nn

from edgellm.errors import OpError
from edgellm.ops.canonical import DOMAIN
from edgellm.ops.schema import Op, View, view_of
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.graph.capture import OPSET, traced
from edgellm_exporters.graph.faults import let_interrupt_through, quiet
from edgellm_exporters.graph.free_sizes import dims_of, evaluated, example_sizes, renamed
from edgellm_exporters.graph.tracing import CanonicalFunctions, no_collection
from edgellm_exporters.graph.translate import translated

__all__ = ["expand_references"]


def expand_references(model: ir.Model, rules: Collection[str]) -> bool:
    """Put the graph of its reference in the place of each canonical node without a rule. In place.

    Before: a cleaned captured graph. After: every canonical node has a rule.

    Args:
        model: of canonical ops, whose values have dtypes and shapes.
        rules: names of the ops that the target has a form of.

    Returns:
        Whether there was one.

    Raises:
        CaptureError: a reference cannot be traced, fixes a size that is free, or consists of itself.
    """
    graphs: dict[Hashable, ir.Model] = {}
    changed = False
    while missing := [node for node in model.graph if node.domain == DOMAIN and node.op_type not in rules]:
        for node in missing:  # a reference may hold further ones
            view = _view(node)
            key = _signature(view)
            if key not in graphs:
                with no_collection():
                    graphs[key] = _graph_of(view)
            _splice(model.graph, view, graphs[key].clone())
        changed = True
    return changed


def _view(node: ir.Node) -> View:
    try:
        view = view_of(node)
    except OpError as error:
        raise CaptureError(str(error)) from error
    assert view is not None
    return view


def _signature(view: View) -> Hashable:
    """What a trace depends on."""
    values = [None if value is None else (value.dtype, str(value.shape)) for value in view.all(view.op.inputs)]
    return view.op.name, tuple(values), tuple(view.all(view.op.attributes))


class _Reference(nn.Module):
    """A reference as a module of the inputs that a node has."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self.op = view.op
        self.given = [name for name in view.op.inputs if getattr(view, name) is not None]
        self.attributes = {name: getattr(view, name) for name in view.op.attributes}

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        inputs: dict[str, Any] = dict.fromkeys(self.op.inputs) | dict(zip(self.given, tensors, strict=True))
        with CanonicalFunctions(but=self.op):
            found = self.op.reference(**inputs, **self.attributes)
        return [found] if isinstance(found, Tensor) else list(found)


def _graph_of(view: View) -> ir.Model:
    """The graph of a node's reference; its inputs are those that the node has, under their names in the op."""
    reference = _Reference(view)
    shapes = {name: _dims(view, name) for name in reference.given}
    sizes = example_sizes([dim for shape in shapes.values() for dim in shape])
    dtypes = [ir.tensor_adapters.to_torch_dtype(getattr(view, name).dtype) for name in reference.given]
    examples = [  # whose numbers nobody reads
        torch.empty(evaluated(shape, sizes), dtype=dtype) for shape, dtype in zip(shapes.values(), dtypes, strict=True)
    ]
    program = _trace(reference, examples, shapes)
    made = translated(program, reference.given, view.op.outputs, opset=OPSET)
    if any(node.domain == DOMAIN and node.op_type == view.op.name for node in made.graph):
        raise CaptureError(f"{_blame(view.op)} consists of itself")
    _name_sizes(made, shapes)
    return made


def _dims(view: View, name: str) -> list[int | str]:
    """An input's shape: numbers, and names or formulas of free sizes."""
    value = getattr(view, name)
    if value.shape is None or value.dtype is None:
        raise CaptureError(f"op {view.op.name}: its input {name} has no known shape; give the target a rule for the op")
    return dims_of(value.shape)


def _trace(
    reference: _Reference, examples: list[Tensor], shapes: Mapping[str, Sequence[int | str]]
) -> torch.export.ExportedProgram:
    free = [
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for shape in shapes.values()
    ]  # fmt: skip
    try:
        with quiet():
            program = traced(reference, (examples,), (free,))
    except Exception as error:  # torch.export raises many kinds; each means: not one graph
        let_interrupt_through(error)
        raise CaptureError(f"{_blame(reference.op)} cannot be traced: {' '.join(str(error).split())[:400]}") from error
    for name, node in zip(shapes, _inputs(program), strict=True):
        for dim, size in zip(shapes[name], node.meta["val"].shape, strict=True):
            if isinstance(dim, str) and str(size).isdigit():  # what is fixed stays a symbol, that is one number
                raise CaptureError(f"{_blame(reference.op)} fixes the size {dim} of {name}, which must stay free")
    return program


def _blame(op: Op) -> str:
    file = inspect.getsourcefile(inspect.unwrap(op.reference)) or op.reference.__module__
    return f"op {op.name}: its reference in {file}, which is its form on a target without a rule for it,"


def _inputs(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _name_sizes(made: ir.Model, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Call free sizes within a traced graph what the graph around it calls them."""
    known: dict[str, str] = {}
    for value, shape in zip(made.graph.inputs, shapes.values(), strict=True):
        for found, dim in zip(value.shape or (), shape, strict=True):
            if not isinstance(found, int):
                known[str(found)] = str(dim)
    for value in (v for node in made.graph for v in node.outputs):
        value.shape = None if value.shape is None else renamed(value.shape, known)


def _splice(graph: ir.Graph, view: View, made: ir.Model) -> None:
    """Put a traced reference in a node's place."""
    inner, prefix = made.graph, view.node.outputs[0].name
    given = [value for value in view.all(view.op.inputs) if value is not None]
    for parameter, value in zip(inner.inputs, given, strict=True):
        ir.convenience.replace_all_uses_with(parameter, value)
    for value in list(inner.initializers.values()):
        inner.initializers.pop(str(value.name))
        value.name = f"{prefix}/{value.name}"
        graph.register_initializer(value)
    outputs, nodes = list(inner.outputs), list(inner)
    inner.outputs.clear()
    inner.remove(nodes)
    for number, value in enumerate(v for node in nodes for v in node.outputs):
        value.name = f"{prefix}/{number}"
    for old, new in zip(view.node.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, view.node, [view.node], nodes, view.node.outputs, outputs)
