"""Which graphs a target makes of one capture: one for every use, or one for prompts and one for single tokens.

What differs between the two is here and in what they call, and is decided once; the pipeline asks neither which it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from edgellm_exporters.engines.fixed_sizes import Sizes, sizes_of, write_roles
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.tensorrt import add_engines
from edgellm_exporters.graph.capture_encoder import Graphs
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import ENCODER_FILE, GRAPH_FILE, Progress, with_own_constants, write_graphs
from edgellm_exporters.proof.stand_in import check_types
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime.bundle import Manifest
from edgellm_runtime.bundle.engine_info import GraphInfo

__all__ = ["FixedGraphs", "GraphSet", "OneGraph", "graph_set"]


class GraphSet(Protocol):
    """The graphs of one bundle."""

    @property
    def context(self) -> int:
        """The most tokens of a row."""
        ...

    @property
    def graphs(self) -> Mapping[str, GraphInfo]:
        """What the manifest says of graphs by their role; nothing where one serves every use."""
        ...

    @property
    def capacity(self) -> int | None:
        """Slots for tokens that each row of the state has from the start; None where it grows."""
        ...

    def write(self, graphs: Graphs, plan: Plan, directory: Path, stand_in: Path | None, progress: Progress) -> None:
        """Lower captured graphs, which are used up, and write them.

        Args:
            graphs: after the target's passes.
            plan: which weights to quantize, and how.
            directory: of the bundle.
            stand_in: where to write the same graphs in float32 for the proof; None where the bundle's own run here.
            progress: told what is written, and how much of it.

        Raises:
            LoweringError: the target would not compute what the graph says.
        """
        ...

    def finish(self, directory: Path, manifest: Manifest, progress: Progress) -> Manifest:
        """What is made of the written graphs once they are proved; the manifest with it."""
        ...


@dataclass(frozen=True)
class OneGraph:
    """One graph for every use.

    Args:
        target: that it is made for.
        dtype: of activations, state and weights that are not quantized.
        context: the most tokens of a row.
    """

    target: Target
    dtype: str
    context: int
    capacity: int | None = None

    @property
    def graphs(self) -> Mapping[str, GraphInfo]:
        return {}

    def write(self, graphs: Graphs, plan: Plan, directory: Path, stand_in: Path | None, progress: Progress) -> None:
        """See :class:`GraphSet`."""
        if stand_in is not None:
            copies = Graphs(*(each.clone() for each in graphs.all))
            write_graphs(self._lowered(copies, plan, rounded=self.dtype), stand_in, progress)
        written = self._lowered(graphs, plan, dtype=self.dtype)
        plan.caches.declare(written[GRAPH_FILE])
        write_graphs(written, directory, progress)
        if stand_in is not None:
            for name in written:
                check_types(directory / name)

    def _lowered(self, graphs: Graphs, plan: Plan, *, dtype: str = "float32", rounded: str = "") -> dict[str, ir.Model]:
        """By the files that they are written to."""
        if graphs.encoder is not None:
            with_own_constants(graphs.encoder)
        files = zip((GRAPH_FILE, ENCODER_FILE), graphs.all, strict=False)
        return {name: lower_to(graph, self.target, plan, dtype=dtype, rounded=rounded) for name, graph in files}

    def finish(self, directory: Path, manifest: Manifest, progress: Progress) -> Manifest:
        """See :class:`GraphSet`: nothing."""
        return manifest


@dataclass(frozen=True)
class FixedGraphs:
    """A graph of fixed sizes for each role, and engines built from them.

    Args:
        target: that they are made for.
        dtype: of activations, state and weights that are not quantized.
        sizes: of the graphs.
        options: what engines are built for.
    """

    target: Target
    dtype: str
    sizes: Sizes
    options: EngineOptions

    @property
    def context(self) -> int:
        return self.sizes.max_context

    @property
    def graphs(self) -> Mapping[str, GraphInfo]:
        return self.sizes.graphs

    @property
    def capacity(self) -> int | None:
        return self.sizes.capacity

    def write(self, graphs: Graphs, plan: Plan, directory: Path, stand_in: Path | None, progress: Progress) -> None:
        """See :class:`GraphSet`."""
        write_roles(graphs, self.target, plan, self.sizes.forms(self.dtype), directory, progress)
        if stand_in is not None:
            write_roles(graphs, self.target, plan, self.sizes.forms("float32", self.dtype), stand_in, progress)

    def finish(self, directory: Path, manifest: Manifest, progress: Progress) -> Manifest:
        """See :class:`GraphSet`: engines, unless they are left to the device."""
        return add_engines(directory, manifest, self.options, progress) if self.options.build else manifest


def graph_set(
    target: Target, dtype: str, engine: EngineOptions | None, model_context: int, *, one_pass: bool = False
) -> GraphSet:
    """The graphs that a target makes.

    Args:
        target: to make them for.
        dtype: of activations, state and weights that are not quantized.
        engine: what engines are built for; None for what :class:`EngineOptions` says.
        model_context: the most tokens of a row that the model takes.
        one_pass: whether it reads a row in one step.

    Raises:
        ExportError: sizes that the model does not have.
    """
    if not target.roles:
        return OneGraph(target, dtype, model_context)
    options = engine or EngineOptions()
    return FixedGraphs(target, dtype, sizes_of(options, model_context, one_pass=one_pass), options)
