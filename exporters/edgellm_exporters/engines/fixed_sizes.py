"""Graphs of fixed sizes: the forms that a target of engines makes of one capture, and how they are run on this machine.

ONNX Runtime's CPU kernels know float16 but not bfloat16. A bfloat16 bundle is therefore proved by its twin: the very
same graphs in float32, with every weight rounded to bfloat16 first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgellm_exporters.atomic import scratch_directory
from edgellm_exporters.engines.lint import lint
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.errors import ExportError, LoweringError
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import Progress, write_graphs
from edgellm_exporters.lowering.fixed_form import DECODE, PREFILL, Form
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime.backends import Backend
from edgellm_runtime.backends.graph_roles import Roles
from edgellm_runtime.backends.ort import OrtBackend
from edgellm_runtime.backends.ort_roles import OrtRolesBackend
from edgellm_runtime.bundle import GRAPH, Manifest
from edgellm_runtime.bundle.engine_info import GraphInfo
from edgellm_runtime.checks.verify import AT_LEAST
from edgellm_runtime.session import Session

__all__ = [
    "EngineOptions",
    "Sizes",
    "check_types",
    "graph_file",
    "loosened",
    "proof_session",
    "proved_on",
    "sizes_of",
    "twins",
    "write_roles",
]

_WITHOUT_KERNELS = ("bfloat16",)
_SLOTS = 64  # the cache's slots are a multiple of this
# What 16 bits of activations cost, whatever the weights are; of a check that is not named nothing is promised.
_ROUNDOFF: Mapping[str, Mapping[str, float]] = {
    "float16": {"logits": 0.02, "kl": 1e-4, "top1": 0.98, "state": 0.01, "split": 0.02, "batch": 0.02},
    "bfloat16": {"logits": 0.1, "kl": 5e-3, "top1": 0.9, "state": 0.1, "split": 0.1, "batch": 0.1},
}


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


def sizes_of(options: EngineOptions, model_context: int) -> Sizes:
    """The sizes for a model.

    Raises:
        ExportError: a longer context than the model's is asked for.
    """
    if options.max_context > model_context:
        raise ExportError(
            f"max_context is {options.max_context}, but the model's context holds {model_context} tokens; ask for no "
            "more"
        )
    context = options.max_context or model_context
    chunk = min(options.chunk, context)
    return Sizes(context, chunk, -(-(context + chunk) // _SLOTS) * _SLOTS)


def loosened(bounds: Mapping[str, float], dtype: str) -> Mapping[str, float]:
    """A method's bounds for activations of a dtype."""
    if dtype == "float32":
        return bounds
    own = _ROUNDOFF[dtype]
    return {n: (min if n in AT_LEAST else max)(bound, own[n]) for n, bound in bounds.items() if n in own}


@contextmanager
def twins(beside: Path, dtype: str) -> Iterator[Path | None]:
    """A directory for graphs that are run once and not kept, beside the bundle; None for a dtype that needs none."""
    if dtype not in _WITHOUT_KERNELS:
        yield None
        return
    with scratch_directory(beside.with_name("twin")) as directory:
        yield directory


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


def proved_on(dtype: str) -> str:
    """What the numbers of a bundle were compared with PyTorch on, for the manifest."""
    if dtype in _WITHOUT_KERNELS:
        return f"ONNX Runtime on CPU, in float32 with weights rounded to {dtype}"
    return f"ONNX Runtime on CPU, in {dtype}"


def check_types(graph: Path) -> None:
    """Have ONNX Runtime look at a graph that it has no kernels for here: names, shapes and types must be sound.

    Raises:
        LoweringError: they are not.
    """
    import onnxruntime

    try:
        onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise LoweringError(f"the lowered graph is not sound: {str(error).strip()[:300]}") from error


def proof_session(directory: Path, manifest: Manifest) -> Session:
    """Steps of a twin's graphs, whose state is float32."""
    state = tuple(dataclasses.replace(spec, dtype="float32") for spec in manifest.signature.state)
    wide = dataclasses.replace(manifest.signature, state=state)
    sizes: dict[str, Any] = {}
    backend: Backend
    if manifest.graphs:
        roles = Roles.of(manifest)
        backend = OrtRolesBackend(directory, roles, wide)
        sizes = {"chunk": roles.longest, "capacity": manifest.capacity}
    else:
        backend = OrtBackend(directory / GRAPH, wide)
    return Session(
        backend, wide, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        vocab_size=manifest.vocab_size, **sizes,
    )  # fmt: skip
