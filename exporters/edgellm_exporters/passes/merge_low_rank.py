"""Low-rank products that are added to the parts of one Linear, in one product that is added to the whole."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgellm.ops import LINEAR
from edgellm.ops.schema import views

__all__ = ["MergeLowRank"]


class _LowRank(NamedTuple):
    """A part of a Split to which (x A) B is added, A and B of the stacks' place ``choice``, looked up by ``lookup``."""

    part: int
    add: ir.Node
    x: ir.Value
    choice: ir.Value
    lookup: ir.Node
    down: ir.Value  # (places, columns, rank)
    up: ir.Value  # (places, rank, rows)


class MergeLowRank(ir.passes.InPlacePass):
    """Adapters of the parts of a merged Linear become one: their As side by side, their Bs along a diagonal.

    Before: canonical graph after ``MergeLinears``. After: what was added to two or more parts of a Linear, of its own
    input and with one choice among stacks, is added before its Split. TensorRT for RTX 1.7 ends the process when it
    builds an engine where value and another part have such sums and their Linear an input of 8 bits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge every group, in place."""
        made = False
        for view in views(model.graph, LINEAR):
            users = [user for user, _ in view.y.uses()]
            if len(users) != 1 or users[0].op_type != "Split" or (sizes := _sizes(users[0])) is None:
                continue
            for group in _groups(users[0], view.x):
                _merge(model.graph, users[0], sizes, group)
                made = True
        if made:
            model.graph.sort()  # a choice that was made after the Split is asked for before it now
        return ir.passes.PassResult(model, made)


def _sizes(split: ir.Node) -> list[int] | None:
    """Of the parts, where a Split is of the last axis and says them."""
    axis, sizes = split.attributes.get("axis"), split.inputs[1] if len(split.inputs) > 1 else None
    if axis is None or axis.as_int() != -1 or sizes is None or sizes.const_value is None:
        return None
    return [int(n) for n in sizes.const_value.numpy()]


def _groups(split: ir.Node, x: ir.Value) -> list[list[_LowRank]]:
    """The products of what the Linear reads that can be one, for each choice."""
    found: dict[tuple[ir.Value, int], list[_LowRank]] = defaultdict(list)
    for part, value in enumerate(split.outputs):
        users = [user for user, _ in value.uses()]
        one = _low_rank(part, value, users[0]) if len(users) == 1 and users[0].op_type == "Add" else None
        if one is not None and one.x is x:
            found[one.choice, _places(one.down)].append(one)
    return [group for group in found.values() if len(group) > 1]


def _low_rank(part: int, value: ir.Value, add: ir.Node) -> _LowRank | None:
    other = next((x for x in add.inputs if x is not value), None)
    outer = _producer(other, "MatMul")
    inner = None if outer is None else _producer(outer.inputs[0], "MatMul")
    if outer is None or inner is None:
        return None
    up, down = _producer(outer.inputs[1], "Gather"), _producer(inner.inputs[1], "Gather")
    if up is None or down is None or any(_axis(g) for g in (up, down)):
        return None
    stacks, index = [gather.inputs[0] for gather in (down, up)], _origin(up.inputs[1])
    x = inner.inputs[0]
    if index is not _origin(down.inputs[1]):
        return None
    if x is None or index is None or any(s is None or s.const_value is None or len(s.shape or ()) != 3 for s in stacks):
        return None
    return _LowRank(part, add, x, index, up, stacks[0], stacks[1])  # type: ignore[arg-type]


def _origin(index: ir.Value | None) -> ir.Value | None:
    """What a list of indices was before it was given another form, anew at each lookup."""
    while (node := _producer(index, "Reshape") or _producer(index, "Cast")) is not None:
        index = node.inputs[0]
    return index


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and not node.domain else None


def _axis(gather: ir.Node) -> int:
    axis = gather.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _places(stack: ir.Value) -> int:
    assert stack.const_value is not None
    return int(stack.const_value.shape.numpy()[0])


def _merge(graph: ir.Graph, split: ir.Node, sizes: list[int], group: list[_LowRank]) -> None:
    whole = split.inputs[0]
    assert whole is not None
    downs, ups = (
        [value.const_value.numpy() for value in values]  # type: ignore[union-attr]
        for values in ([one.down for one in group], [one.up for one in group])
    )
    down = np.concatenate(downs, axis=2)
    up = np.zeros((len(down), down.shape[2], sum(sizes)), down.dtype)
    rank = 0
    for one, own in zip(group, ups, strict=True):
        start = sum(sizes[: one.part])
        up[:, rank : rank + own.shape[1], start : start + own.shape[2]] = own
        rank += own.shape[1]
    stacks = [_initializer(graph, "+".join(str(v.name) for v in names), array) for names, array in (
        ([one.down for one in group], down), ([one.up for one in group], up),
    )]  # fmt: skip
    chosen = [ir.node("Gather", [stack, group[0].lookup.inputs[1]], attributes={"axis": 0}) for stack in stacks]
    narrow = ir.node("MatMul", [group[0].x, chosen[0].outputs[0]])
    wide = ir.node("MatMul", [narrow.outputs[0], chosen[1].outputs[0]])
    added = ir.node("Add", [whole, wide.outputs[0]])
    for node in (*chosen, narrow, wide, added):
        node.outputs[0].type = whole.type
    added.outputs[0].shape = whole.shape
    graph.insert_before(split, [*chosen, narrow, wide, added])
    split.replace_input_with(0, added.outputs[0])
    for one in group:
        ir.convenience.replace_all_uses_with(one.add.outputs[0], split.outputs[one.part])
        graph.remove(one.add, safe=True)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
