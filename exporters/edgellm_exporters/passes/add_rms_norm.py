"""Residual and norm in one node."""

from __future__ import annotations

import onnx_ir as ir

from edgellm.ops.canonical import DOMAIN

__all__ = ["FuseAddRMSNorm"]


class FuseAddRMSNorm(ir.passes.InPlacePass):
    """``Add -> RMSNorm`` becomes ``AddRMSNorm``, which gives the norm and the sum.

    Before: canonical graph. After: an RMSNorm whose input was a sum of two tensors of one shape is fused with it; other
    users of the sum read the second output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every pair, in place."""
        changed = False
        for norm in list(model.graph):
            if norm.op_type != "RMSNorm" or norm.domain != DOMAIN:
                continue
            total = norm.inputs[0]
            add = total.producer() if total is not None else None
            if add is None or add.op_type != "Add" or add.domain != "" or not _same_shape(add):
                continue
            fused = ir.node(
                "AddRMSNorm", [*add.inputs, norm.inputs[1]], domain=DOMAIN, num_outputs=2,
                attributes={"epsilon": norm.attributes["epsilon"].as_float()},
            )  # fmt: skip
            old = [norm.outputs[0], add.outputs[0]]
            # at the sum's place: both its inputs are there, and all readers of either output come later
            ir.convenience.replace_nodes_and_values(model.graph, add, [norm, add], [fused], old, fused.outputs)
            changed = True
        return ir.passes.PassResult(model, changed)


def _same_shape(add: ir.Node) -> bool:
    a, b = (value.shape if value is not None else None for value in add.inputs)
    return a is not None and b is not None and len(a) == len(b) and a == b
