"""Two forms of one node, of which a step takes the one that its sizes want: an ONNX If with both in its branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgellm_exporters.lowering.context import Lowering

__all__ = ["choose"]

Make = Callable[[], Sequence[ir.Value]]


def choose(context: Lowering, name: str, condition: ir.Value, then: Make, otherwise: Make) -> list[ir.Value]:
    """Add an If.

    Args:
        context: of the lowering.
        name: what the branches' values are called after; unique in the graph.
        condition: a scalar of booleans.
        then: adds the nodes of one branch and gives what it gives, each made by a node of that branch.
        otherwise: the same for the other branch; as many values.

    Returns:
        What the branch that was taken gives.
    """
    bodies = [_branch(context, f"{name}.{side}", make) for side, make in (("then", then), ("else", otherwise))]
    given = [len(body.outputs) for body in bodies]
    assert given[0] == given[1], f"{name}: one branch gives {given[0]} values, the other {given[1]}"
    return context.ops(given[0], "If", condition, then_branch=bodies[0], else_branch=bodies[1])


def _branch(context: Lowering, name: str, make: Make) -> ir.Graph:
    outer = context.take_nodes()  # what came before belongs to the outer graph
    with context.apart():
        outputs = make()
        nodes = context.take_nodes()
    context.put_back(outer)
    for number, value in enumerate(v for n in nodes for v in n.outputs):
        value.name = f"{name}.{number}"  # names in a branch must differ from those of the graph around it
    return ir.Graph([], outputs, nodes=nodes, name=name)
