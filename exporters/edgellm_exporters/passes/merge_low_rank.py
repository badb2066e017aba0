"""Low-rank products that are added to the parts of one Linear, in one product that is added to the whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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
        found = _found(model)
        for split, sizes, group in found:
            _merge(model.graph, split, sizes, group)
        if found:
            model.graph.sort()  # a choice that was made after the Split is asked for before it now
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """No group is left.

        Raises:
            PostconditionError: one is.
        """
        if left := _found(model):
            raise ir.passes.PostconditionError(f"what is added to {left[0][2][0].add.name} could be merged and was not")


def _found(model: ir.Model) -> list[tuple[ir.Node, list[int], list[_LowRank]]]:
    """Splits of Linears with the sizes of their parts and what is added to some of them, a group for each choice."""
    found = []
    for view in views(model.graph, LINEAR):
        users = [user for user, _ in view.y.uses()]
        if len(users) == 1 and users[0].op_type == "Split" and (sizes := _sizes(users[0])) is not None:
            found += [(users[0], sizes, group) for group in _groups(users[0], view.x)]
    return found


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
    stacks = _side_by_side(graph, [one.down for one in group]), _along_a_diagonal(graph, sizes, group)
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


def _side_by_side(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """The As of a group as one (places, columns, ranks), made when it is read."""
    tensors = [_tensor(value) for value in values]
    places, columns, _ = tensors[0].shape.numpy()
    shape = ir.Shape([places, columns, sum(t.shape.numpy()[2] for t in tensors)])
    return _initializer(graph, values, shape, lambda: np.concatenate([t.numpy() for t in tensors], axis=2))


def _along_a_diagonal(graph: ir.Graph, sizes: Sequence[int], group: Sequence[_LowRank]) -> ir.Value:
    """The Bs of a group as one (places, ranks, rows of all parts), each where its part is, made when it is read."""
    tensors, starts = [_tensor(one.up) for one in group], [sum(sizes[: one.part]) for one in group]
    shape = ir.Shape([tensors[0].shape.numpy()[0], sum(t.shape.numpy()[1] for t in tensors), sum(sizes)])

    def made() -> np.ndarray:
        whole, rank = np.zeros(shape.numpy(), tensors[0].dtype.numpy()), 0
        for start, own in zip(starts, (t.numpy() for t in tensors), strict=True):
            whole[:, rank : rank + own.shape[1], start : start + own.shape[2]] = own
            rank += own.shape[1]
        return whole

    return _initializer(graph, [one.up for one in group], shape, made)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _initializer(
    graph: ir.Graph, values: Sequence[ir.Value], shape: ir.Shape, made: Callable[[], np.ndarray]
) -> ir.Value:  # fmt: skip
    """A lazy one in the place of some others, of whose numbers and name its own are made."""
    dtype = _tensor(values[0]).dtype
    value = ir.Value(
        name="+".join(str(v.name) for v in values),
        const_value=ir.LazyTensor(lambda: ir.tensor(made()), dtype=dtype, shape=shape),
        shape=shape,
        type=ir.TensorType(dtype),
    )
    graph.register_initializer(value)
    return value
