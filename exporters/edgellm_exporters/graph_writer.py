"""Captures a model and writes its graphs with their weights quantized: by one method, or within a budget."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from edgellm.models.protocol import LanguageModel
from edgellm.streaming import Weights
from edgellm_exporters.auto.automatic import Automatic, quantize_within
from edgellm_exporters.auto.budget import AUTO, Budget, bounds_of
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.capture import capture, hidden_of
from edgellm_exporters.graph.capture_encoder import Graphs, capture_graphs
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.graph.lower import kernel_notes, prepare
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import Progress
from edgellm_exporters.graph_sets import GraphSet
from edgellm_exporters.options import ExportOptions
from edgellm_exporters.quantize.cache import narrowed
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.record import recorded
from edgellm_exporters.quantize.tuning.tune import tuned
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.spec import TensorSpec

__all__ = ["GraphWriter", "Quantized"]

_CACHE_WINDOWS = 4  # of the calibration text: ranges need less of it than codes do


@dataclass(frozen=True)
class Quantized:
    """What became of the weights.

    Args:
        record: for the manifest.
        bounds: that the formats promise to hold.
        plan: that the graphs were written with.
        hidden: the graph's output of hidden states; None: it gives none.
    """

    record: Mapping[str, Any]
    bounds: Mapping[str, float]
    plan: Plan
    hidden: TensorSpec | None


@dataclass(frozen=True, kw_only=True)
class GraphWriter:
    """Writes the graphs of one bundle.

    Args:
        model: in eval mode; its parameters may be on the meta device.
        weights: where they are read.
        target: to write for.
        graphs: those that the target makes.
        options: of the export.
        rows: golden rows; what they show is gone by where there is no calibration text.
        scratch: where to write.
        notes: what a person should know of the bundle, added to.
        progress: told what is being done and how much of it.
    """

    model: LanguageModel
    weights: Weights
    target: Target
    graphs: GraphSet
    options: ExportOptions
    rows: Sequence[Sequence[int]]
    scratch: Path
    notes: list[str]
    progress: Progress

    def write(self, stand_in: Path | None) -> Quantized:
        """Write them, as the options say.

        Args:
            stand_in: where to write the same graphs in float32 for the proof; None where the bundle's own run here.
        """
        if self.options.budget is not None:
            return self._within_budget(self.options.budget)
        return self._by_method(stand_in)

    def _by_method(self, stand_in: Path | None) -> Quantized:
        """Weights quantized by one method."""
        graphs, plan = self._planned()
        hidden = hidden_of(graphs.step)
        self.graphs.write(graphs, plan, self.scratch, stand_in, self.progress)
        plan.forget()
        bounds = find_method(self.options.quantize, self.target.methods).bounds
        return Quantized(recorded(plan, self.options.quantize), bounds, plan, hidden)

    def _planned(self) -> tuple[Graphs, Plan]:
        """The graphs before lowering, and which of their weights to quantize how."""
        options, model = self.options, self.model
        graphs = capture_graphs(model, self.weights, hidden=options.hidden)
        for each in graphs.all:
            prepare(each, self.target)
        caches = self._caches(graphs.step)
        give_back()
        gc.freeze()  # so too what tracing made PyTorch keep
        assert isinstance(model, nn.Module)
        method, paths = find_method(options.quantize, self.target.methods), list(layer_modules(model))
        plan = make_plan(
            method, graphs.step, model, self.rows, options.calibration, self.progress, self.weights,
            encoder=graphs.encoder, layers=paths, scratch=self.scratch,
        )  # fmt: skip
        plan.caches = caches
        if options.tuning is not None:
            plan = tuned(plan, model, self.weights, paths, graphs.all, options.tuning, self.progress)
        give_back()
        return graphs, plan

    def _within_budget(self, budget: Budget) -> Quantized:
        """Weights in the formats that a search chose."""
        options, model = self.options, self.model
        hidden = hidden_of(capture(model, self.weights, hidden=True)) if options.hidden else None
        job = Automatic(
            model=model, weights=self.weights, target=self.target, calibration=options.calibration,
            held_out=options.held_out, hidden=hidden, tuning=options.tuning,
        )  # fmt: skip
        others = sum(file.stat().st_size for file in self.scratch.iterdir())
        job = dataclasses.replace(job, caches=self._caches(job.graph()))
        found = quantize_within(budget, job, self.scratch, others, self.progress)
        bounds = bounds_of(budget, found.schemes)
        return Quantized({"method": AUTO, **found.record}, bounds, found.plan, hidden)

    def _caches(self, captured: ir.Model) -> NarrowCaches:
        """The states that the bundle keeps in fewer bits; to the notes, what of a graph lacks a kernel."""
        target, options = self.target, self.options
        lacking = kernel_notes(captured, target)
        self.notes.extend(lacking)
        if options.kv_cache == "float32":
            return NarrowCaches()
        if lacking:
            raise ExportError(
                f"such a cache needs target {target.name}'s kernel, but {lacking[0]}; leave --kv-cache out"
            )
        self.progress("looking at keys and values", 0.0)
        seen = options.calibration[:_CACHE_WINDOWS] or self.rows
        even = [row for row in seen if len(row) == len(seen[0])]
        return narrowed(options.kv_cache, captured, self.model, self.weights, target.narrow_caches, even)
