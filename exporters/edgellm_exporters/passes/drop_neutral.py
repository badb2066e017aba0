"""Nodes that change nothing: products with ones, sums with nothing, axes turned and turned back, a shape and back.

Slices that are put together again are such, too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["DropNeutral"]

_SMALL = 1 << 14  # numbers; a constant that is looked at is no weight
_AS_IT_IS = ("Unsqueeze", "Squeeze", "Reshape", "Identity")  # whose result holds the very numbers of their input


class DropNeutral(ir.passes.InPlacePass):
    """Readers of a node that changes nothing read what it read.

    Such nodes come with modules that were not written for this graph: a rotation by (1, 0), because attention rotates,
    or a head split off and put back where it was. Before: a captured graph. After: every ``x * 1`` and ``x + 0`` of
    x's shape, every Transpose that undoes the one before it, every Reshape to the shape before the last one, and every
    Concat of all slices of one value is without readers. A product with constant zeros counts as zero, for no number of
    a model that can be proved is infinite.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drop every one, in place."""
        changed = False
        for node in list(model.graph):  # sorted, so that what a node reads has been looked at before it
            same = _same_as(node)
            if same is not None and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], same)
                changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No node that changes nothing has a reader."""
        for node in model.graph:
            out = node.outputs[0]
            if out.uses() and not out.is_graph_output() and _same_as(node) is not None:
                raise ir.passes.PostconditionError(f"{node.op_type} {out.name} changes nothing and is still read")


def _same_as(node: ir.Node) -> ir.Value | None:
    """The input that a node gives as it is."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    found = None
    if node.op_type == "Mul":
        found = _other(node, lambda value: _is_all(value, 1))
    elif node.op_type == "Add":
        found = _other(node, _is_zero)
    elif node.op_type in ("Transpose", "Reshape"):
        before = node.inputs[0].producer()
        if before is not None and not before.domain and before.op_type == node.op_type:
            undone = node.op_type == "Reshape" or _undoes(node, before)
            found = before.inputs[0] if undone else None
    elif node.op_type == "Concat":
        found = _whole(node)
    return found if found is not None and _same_shape(found, node.outputs[0]) else None


def _other(node: ir.Node, is_neutral: object) -> ir.Value | None:
    a, b = node.inputs
    assert callable(is_neutral)
    for value, other in ((a, b), (b, a)):
        if value is not None and is_neutral(value):
            return other
    return None


def _whole(concat: ir.Node) -> ir.Value | None:
    """The value that a Concat puts together from all its slices, in order."""
    axis, source, end = concat.attributes["axis"].as_int(), None, 0
    rank = 0 if concat.outputs[0].shape is None else len(concat.outputs[0].shape)
    for part in concat.inputs:
        node = part.producer() if part is not None else None
        if node is None or node.domain or node.op_type != "Slice" or len(node.inputs) < 4:
            return None
        known = [None if value is None else _known(value) for value in node.inputs[1:]]
        if any(value is None or value.size != 1 for value in known):
            return None
        start, stop, along, *step = (int(value.item()) for value in known if value is not None)
        if start != end or along % rank != axis % rank or step not in ([], [1]) or stop <= start:
            return None
        if source is not None and node.inputs[0] is not source:
            return None
        source, end = node.inputs[0], stop
    return source if _reaches(source, axis, end) else None


def _reaches(source: ir.Value | None, axis: int, end: int) -> bool:
    size = source.shape[axis] if source is not None and source.shape is not None else None
    return isinstance(size, int) and end >= size


def _undoes(node: ir.Node, before: ir.Node) -> bool:
    perms = [n.attributes["perm"].as_ints() if "perm" in n.attributes else None for n in (before, node)]
    if None in perms:
        return perms == [None, None]  # axes reversed, twice
    first, second = (list(p) for p in perms if p is not None)
    return [first[axis] for axis in second] == list(range(len(first)))


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or a.shape != b.shape:
        return False
    return all(isinstance(d, int) or d.value is not None for d in a.shape) and a.dtype in (b.dtype, None)


def _is_zero(value: ir.Value) -> bool:
    """Whether a value is zeros, or a product with zeros."""
    if _is_all(value, 0):
        return True
    node = value.producer()
    return node is not None and not node.domain and node.op_type == "Mul" and any(
        factor is not None and _is_all(factor, 0) for factor in node.inputs
    )  # fmt: skip


def _is_all(value: ir.Value, number: float) -> bool:
    known = _known(value)
    return known is not None and bool((known == number).all())


def _known(value: ir.Value) -> NDArray[np.generic] | None:
    """The numbers of a small constant, in any shape."""
    tensor, node = value.const_value, value.producer()
    if tensor is not None:
        return tensor.numpy() if tensor.size <= _SMALL and not isinstance(tensor, ir.LazyTensor) else None
    if node is None or node.domain or node.op_type not in _AS_IT_IS or node.inputs[0] is None:
        return None
    return _known(node.inputs[0])
