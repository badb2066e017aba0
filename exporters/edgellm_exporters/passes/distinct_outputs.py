"""Each result of a loop's or a branch's body is a value of its own; ONNX Runtime computes others wrong, in silence."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["DistinctOutputs"]


class DistinctOutputs(ir.passes.InPlacePass):
    """Puts an ``Identity`` before a result of a body that is given twice, or that the body does not compute.

    Before: any graph; whoever takes identities away leaves one value in two places. After: every result of a body is
    the output of one of its nodes, and no two are the same.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Go through every body, in place."""
        changed = False
        for body in _bodies(model):
            for index, value in enumerate(list(body.outputs)):
                if not _is_of_its_own(body, index):
                    copy = ir.node("Identity", [value])
                    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
                    copy.outputs[0].name = f"{value.name}.{index}"
                    body.append(copy)
                    body.outputs[index] = copy.outputs[0]
                    changed = True
        return ir.passes.PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Every result is a value of its own."""
        for body in _bodies(model):
            if left := [v.name for i, v in enumerate(body.outputs) if not _is_of_its_own(body, i)]:
                raise ir.passes.PostconditionError(f"{body.name} gives {left[0]}, which is not its own")


def _bodies(model: ir.Model) -> list[ir.Graph]:
    attributes = [a for node in model.graph.all_nodes() for a in node.attributes.values()]
    return [a.as_graph() for a in attributes if a.type == ir.AttributeType.GRAPH]


def _is_of_its_own(body: ir.Graph, index: int) -> bool:
    value, before = body.outputs[index], list(body.outputs)[:index]
    producer = value.producer()
    return producer is not None and producer.graph is body and all(value is not other for other in before)
