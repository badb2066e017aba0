"""An expert's gate and what it multiplies in one product."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops import EXPERT
from edgellm.ops.schema import View, views
from edgellm_exporters.passes.merge_linears import concatenated, mergeable

__all__ = ["MergeExperts"]


class MergeExperts(ir.passes.InPlacePass):
    """Experts whose gate is a matrix of its own become packed ones.

    Before: canonical graph whose weights are initializers. After: no expert has such a gate, unless a weight is used
    elsewhere too or only one of the two has a bias. Rows of a weight are quantized on their own, so merging changes no
    number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge every expert's, in place."""
        found = _apart(model)
        for view in found:
            _merge(model.graph, EXPERT.of(view.node))  # as earlier merges left it
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left to merge."""
        if left := _apart(model):
            raise ir.passes.PostconditionError(f"{left[0].gate.name} could be merged and was not")


def _apart(model: ir.Model) -> list[View]:
    """Experts that can become packed ones."""
    found = [view for view in views(model.graph, EXPERT) if view.gate is not None]
    return [
        view for view in found
        if (view.gate_bias is None) == (view.up_bias is None)
        and all(map(mergeable, (view.gate, view.up, view.gate_bias, view.up_bias)))
    ]  # fmt: skip


def _merge(graph: ir.Graph, view: View) -> None:
    both = concatenated(graph, [view.gate, view.up])
    bias = None if view.up_bias is None else concatenated(graph, [view.gate_bias, view.up_bias])
    packed = EXPERT.node(
        ir.node, total=view.total, x=view.x, share=view.share, up=both, down=view.down, up_bias=bias,
        down_bias=view.down_bias, activation=view.activation, packed=True, slope=view.slope, offset=view.offset,
        limit=view.limit,
    )  # fmt: skip
    packed.outputs[0].shape, packed.outputs[0].type = view.sum.shape, view.sum.type
    packed.outputs[0].name = view.sum.name
    ir.convenience.replace_nodes_and_values(graph, view.node, [view.node], [packed], [view.sum], packed.outputs)
