"""Residual and norm in one node."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops import ADD_RMS_NORM, RMS_NORM
from edgellm.ops.schema import View, views

__all__ = ["FuseAddRMSNorm"]

_AXES = 3  # (batch, time, width): what kernels take; a norm of each head after its rotation is of a sum of four axes


class FuseAddRMSNorm(ir.passes.InPlacePass):
    """``Add -> RMSNorm`` becomes ``AddRMSNorm``, which gives the norm and the sum.

    Before: canonical graph. After: an RMSNorm whose input was a sum of two tensors of one shape, of at most three axes,
    is fused with it; other users of the sum read the second output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every pair, in place."""
        changed = False
        for norm in views(list(model.graph), RMS_NORM):
            add = _sum_before(norm)
            if add is None:
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

    def ensures(self, model: ir.Model) -> None:
        """No norm is left that could be fused with the sum before it."""
        left = [norm for norm in views(model.graph, RMS_NORM) if _sum_before(norm) is not None]
        if left:
            raise ir.passes.PostconditionError(f"the norm with {left[0].weight.name} was not fused with its sum")


def _sum_before(norm: View) -> ir.Node | None:
    add = norm.x.producer()
    return add if add is not None and add.op_type == "Add" and add.domain == "" and _same_shape(add) else None


def _same_shape(add: ir.Node) -> bool:
    a, b = (value.shape if value is not None else None for value in add.inputs)
    return a is not None and b is not None and len(a) == len(b) <= _AXES and a == b
