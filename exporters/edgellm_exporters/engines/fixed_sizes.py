"""Graphs of fixed sizes: those that a target of engines makes of one capture, for prompts and for single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgellm_exporters.engines.lint import lint
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.capture_encoder import Graphs
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import ENCODER_FILE, Progress, with_own_constants, write_graphs
from edgellm_exporters.lowering.fixed_form import DECODE, ENCODE, FREE, PREFILL, Form
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
        """Role to form, of graphs that step."""
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
    graphs: Graphs, target: Target, plan: Plan, forms: Mapping[str, Form], directory: Path, progress: Progress
) -> None:
    """Lower captured graphs into one for each role, check them, and write them with their common weights.

    Args:
        graphs: the one that steps, and the encoder's if there is one; they stay as they are.
        target: what to make them for.
        plan: which weights to quantize, and how.
        forms: of the one that steps, by role.
        directory: of the bundle.
        progress: told what is written, and how much of it.

    Raises:
        LoweringError: the target would not compute what such a graph says.
    """
    made = {graph_file(role): (graphs.step.clone(), form) for role, form in forms.items()}
    if graphs.encoder is not None:
        form = next(iter(forms.values()))
        made[ENCODER_FILE] = graphs.encoder.clone(), Form(ENCODE, FREE, FREE, form.dtype, form.rounded)
        with_own_constants(made[ENCODER_FILE][0])
    lowered = {name: lower_to(graph, target, plan, form) for name, (graph, form) in made.items()}
    for name, (_, form) in made.items():
        lint(lowered[name], form.dtype)
    write_graphs(lowered, directory, progress)
