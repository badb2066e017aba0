"""Graphs of fixed sizes: those that a target of engines makes of one capture, for prompts and for single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgellm_exporters.engines.lint import lint
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import Progress, write_graphs
from edgellm_exporters.lowering.fixed_form import DECODE, PREFILL, Form
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime.bundle.engine_info import GraphInfo

__all__ = ["Sizes", "graph_file", "sizes_of", "write_roles"]

_SLOTS = 64  # the cache's slots are a multiple of this


@dataclass(frozen=True)
class Sizes:
    """The sizes that a bundle's graphs are made with.

    Args:
        max_context: the most tokens of a row.
        chunk: tokens of a prompt in one step.
        capacity: slots for tokens in each row, enough for a full row and one padded chunk.
    """

    max_context: int
    chunk: int
    capacity: int

    def forms(self, dtype: str, rounded: str = "") -> Mapping[str, Form]:
        """Role to form."""
        return {
            PREFILL: Form(PREFILL, self.chunk, self.capacity, dtype, rounded),
            DECODE: Form(DECODE, 1, self.capacity, dtype, rounded),
        }

    @property
    def graphs(self) -> Mapping[str, GraphInfo]:
        """What the manifest says of the graphs."""
        return {PREFILL: GraphInfo(graph_file(PREFILL), self.chunk), DECODE: GraphInfo(graph_file(DECODE), 1)}


def graph_file(role: str) -> str:
    """The name of a role's graph in a bundle."""
    return f"{role}.onnx"


def sizes_of(options: EngineOptions, model_context: int, *, one_pass: bool = False) -> Sizes:
    """The sizes for a model.

    Args:
        options: what engines are built for.
        model_context: the most tokens of a row that the model takes.
        one_pass: whether it reads rows in one step, of as many tokens as a row may have.

    Raises:
        ExportError: a longer context than the model's is asked for.
    """
    if options.max_context > model_context:
        raise ExportError(
            f"max_context is {options.max_context}, but the model's context holds {model_context} tokens; ask for no "
            "more"
        )
    context = options.max_context or model_context
    chunk = context if one_pass else min(options.chunk, context)
    return Sizes(context, chunk, -(-(context + chunk) // _SLOTS) * _SLOTS)


def write_roles(
    graph: ir.Model, target: Target, plan: Plan, forms: Mapping[str, Form], directory: Path, progress: Progress
) -> None:
    """Lower one captured graph into a graph for each role, check them, and write them with their common weights.

    Raises:
        LoweringError: the target would not compute what such a graph says.
    """
    lowered = {graph_file(role): lower_to(graph.clone(), target, plan, form) for role, form in forms.items()}
    for model, form in zip(lowered.values(), forms.values(), strict=True):
        lint(model, form.dtype)
    write_graphs(lowered, directory, progress)
