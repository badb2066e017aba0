"""Residual and norm in one node."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops import ADD_RMS_NORM, RMS_NORM
from edgellm.ops.schema import views

__all__ = ["FuseAddRMSNorm"]


class FuseAddRMSNorm(ir.passes.InPlacePass):
    """``Add -> RMSNorm`` becomes ``AddRMSNorm``, which gives the norm and the sum.

    Before: canonical graph. After: an RMSNorm whose input was a sum of two tensors of one shape is fused with it; other
    users of the sum read the second output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every pair, in place."""
        changed = False
        for norm in views(list(model.graph), RMS_NORM):
            add = norm.x.producer()
            if add is None or add.op_type != "Add" or add.domain != "" or not _same_shape(add):
                continue
            a, b = add.inputs
            fused = ADD_RMS_NORM.node(ir.node, a=a, b=b, weight=norm.weight, epsilon=norm.epsilon)
            new = ADD_RMS_NORM.of(fused)
            # at the sum's place: both its inputs are there, and all readers of either output come later
            ir.convenience.replace_nodes_and_values(
                model.graph, add, [norm.node, add], [fused], [norm.y, add.outputs[0]], [new.y, new.total]
            )
            changed = True
        return ir.passes.PassResult(model, changed)


def _same_shape(add: ir.Node) -> bool:
    a, b = (value.shape if value is not None else None for value in add.inputs)
    return a is not None and b is not None and len(a) == len(b) and a == b
