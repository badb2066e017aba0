"""From a captured graph to a target's: passes, lowering, cleaning."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgellm_exporters.lowering.context import lower
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.targets import Target

__all__ = ["clean", "lower_to", "prepare"]


def prepare(captured: ir.Model, target: Target) -> ir.Model:
    """Clean a captured graph and put it through a target's passes, in place: plans are made for what comes out."""
    clean(captured)
    for make in target.passes:
        make()(captured)
    return captured


def clean(captured: ir.Model) -> None:
    """Take away what tracing leaves behind: identities, unused nodes, notes about Python code. In place."""
    ir.passes.Sequential(
        common.IdentityEliminationPass(), common.RemoveUnusedNodesPass(), common.ClearMetadataAndDocStringPass()
    )(captured)


def lower_to(captured: ir.Model, target: Target, plan: Plan) -> ir.Model:
    """Make a target's graph; the captured one is changed in place.

    Args:
        captured: a cleaned canonical graph.
        target: what to make it for.
        plan: which weights to quantize, and how; names are those after the target's passes.
    """
    lower(captured, target.rules, plan)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(), common.TopologicalSortPass(),
        common.NameFixPass(),
    )(captured)  # fmt: skip
    captured.opset_imports.clear()
    captured.opset_imports.update(target.domains)
    captured.producer_name, captured.producer_version = "edgellm", ""
    return captured
