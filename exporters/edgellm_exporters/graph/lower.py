"""From a captured graph to a target's: passes, lowering, cleaning."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from edgellm.ops.schema import views
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.graph.references import expand_references
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.lowering.context import lower
from edgellm_exporters.lowering.fixed_form import DECODE, Form
from edgellm_exporters.lowering.in_float32 import compute_in_float32
from edgellm_exporters.lowering.precision import narrow
from edgellm_exporters.lowering.separate_dequantize import SeparateDequantize
from edgellm_exporters.passes.distinct_outputs import DistinctOutputs
from edgellm_exporters.passes.drop_neutral import DropNeutral
from edgellm_exporters.passes.find_linears import FindLinears
from edgellm_exporters.passes.fold_constants import FoldConstants
from edgellm_exporters.passes.fold_orders import FoldOrders
from edgellm_exporters.passes.head_norms import HeadNorms
from edgellm_exporters.passes.unroll_single_steps import UnrollSingleSteps
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime.graphs.operators import allowed
from edgellm_runtime.spec import CAPACITY

__all__ = ["clean", "kernel_notes", "lower_to", "prepare"]

_LISTED = 4  # layers that a note names


def prepare(captured: ir.Model, target: Target) -> ir.Model:
    """Clean a captured graph and put it through a target's passes, in place: plans are made for what comes out.

    An op that the target has no rule for becomes what its reference does first.
    """
    clean(captured)
    if expand_references(captured, target.rules):
        clean(captured)
    FindLinears()(captured)
    FoldConstants()(captured)  # among them what a rotation that attention has inside leaves behind
    ir.passes.Sequential(DropNeutral(), common.RemoveUnusedNodesPass(), FoldOrders(), FoldConstants())(captured)
    for make in target.passes:
        make()(captured)
    return captured


def kernel_notes(captured: ir.Model, target: Target) -> list[str]:
    """Which of a graph's nodes the target has no kernel for, a sentence for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for view in views(captured.graph):
        if why := target.lacks_kernel(view):
            states = [str(value.name) for value in view.all(view.op.caches)]
            layer = states[0].removeprefix("past.").rpartition(".")[0] if states else str(view.node.name)
            found.setdefault((view.op.name, why), []).append(layer)
    return [f"{name} of {_listed(layers)} runs in its standard form: {why}" for (name, why), layers in found.items()]


def _listed(layers: list[str]) -> str:
    shown = ", ".join(layers[:_LISTED])
    return shown if len(layers) <= _LISTED else f"{shown} and {len(layers) - _LISTED} more"


def clean(captured: ir.Model) -> None:
    """Take away what tracing leaves behind: identities, unused nodes, notes about Python code. In place."""
    ir.passes.Sequential(
        common.IdentityEliminationPass(), DropNeutral(), HeadNorms(), common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    )(captured)  # fmt: skip


def lower_to(
    captured: ir.Model, target: Target, plan: Plan, form: Form | None = None, *, dtype: str = "float32",
    rounded: str = "",
) -> ir.Model:  # fmt: skip
    """Make a target's graph; the captured one is changed in place.

    Args:
        captured: a cleaned canonical graph.
        target: what to make it for.
        plan: which weights to quantize, and how; names are those after the target's passes.
        form: the sizes and the precision of a graph of fixed sizes.
        dtype: of activations, state and weights that are not quantized; a form's own counts instead.
        rounded: a narrower dtype that weights are rounded to first, as :class:`Form` has it.
    """
    if form is not None:
        dtype, rounded = form.dtype, form.rounded
        _fix_sizes(captured, form)
        if form.role == DECODE:
            UnrollSingleSteps()(captured)
    lower(captured, target.rules, plan, form, rounded or dtype)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(), DistinctOutputs(),
        common.TopologicalSortPass(), *(make() for make in target.after_lowering), common.NameFixPass(),
    )(captured)  # fmt: skip
    if form is not None:
        SeparateDequantize()(captured)
    if form is not None or dtype != "float32" or rounded:
        narrow(captured, dtype, rounded)
    compute_in_float32(captured, target.wide.get(dtype, ()), dtype)
    common.NameFixPass()(captured)
    if form is not None:
        _drop_unused_inputs(captured)
    captured.opset_imports.clear()
    captured.opset_imports.update(target.domains)
    captured.producer_name, captured.producer_version = "edgellm", ""
    _check_operators(captured, target)
    return captured


def _check_operators(lowered: ir.Model, target: Target) -> None:
    """Refuse what the runtime would refuse to load, while the model's author is there to read it."""
    for node in lowered.graph.all_nodes():
        if allowed(target.name, node.domain, node.op_type) is None:
            raise LoweringError(
                f"the model's forward became the operator {node.op_type}, which bundles for target {target.name} do "
                "not have; write it with plain tensor arithmetic"
            )


def _fix_sizes(captured: ir.Model, form: Form) -> None:
    sizes = {"time": form.time, CAPACITY: form.capacity, **({"count": 1} if form.role == DECODE else {})}
    for value in (*captured.graph.inputs, *captured.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([sizes.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape])


def _drop_unused_inputs(model: ir.Model) -> None:
    inputs = model.graph.inputs
    for value in list(inputs):
        if not value.uses() and not value.is_graph_output():
            inputs.remove(value)
