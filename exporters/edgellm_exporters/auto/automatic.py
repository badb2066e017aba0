"""Quantization within a budget: estimate, search, build, measure what was built, and search again with what that told.

A bundle's figures are those measured on text that nothing was chosen with; estimates only decide what to build.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from edgellm.models.protocol import LanguageModel
from edgellm.streaming import Weights, resident
from edgellm_exporters.auto.budget import Budget
from edgellm_exporters.auto.formats import FormatChoices, candidates_of
from edgellm_exporters.auto.front_picture import check_library, draw_front
from edgellm_exporters.auto.measured_search import Built, MeasuredSearch
from edgellm_exporters.auto.report import Attempt, Evidence, write_table
from edgellm_exporters.auto.search import table_of
from edgellm_exporters.auto.sensitivity import sensitivities
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.graph.capture import capture, signature_of
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import Target
from edgellm_exporters.graph.write import Progress, write_graph
from edgellm_exporters.lowering import ort
from edgellm_exporters.proof.opened import step_backend
from edgellm_exporters.proof.parity import ParityReport, compare
from edgellm_exporters.quantize.calibrate import check_windows, largest_inputs
from edgellm_exporters.quantize.lossless import smallest_holding
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.plan import ROW, Codes, Plan, Scheme
from edgellm_exporters.quantize.planning import Uses, plan_of, smoothed
from edgellm_exporters.quantize.tuning.tune import Tuning, tuned
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.bundle import GRAPH
from edgellm_runtime.session import Session
from edgellm_runtime.spec import TensorSpec

__all__ = ["Automatic", "Outcome", "none_better_than_held", "quantize_within"]

REPORT, PICTURE = "quantization.md", "quantization.png"
_MOST = 0.5  # of all weights
_NODE_BYTES = 400  # of a graph file, about; the first build tells


@dataclass(frozen=True)
class Outcome:
    """What was chosen.

    Args:
        schemes: by weight's name.
        record: for the manifest.
        plan: that the graph was written with.
    """

    schemes: Mapping[str, Scheme]
    record: Mapping[str, Any]
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Automatic:
    """All that it takes to build one bundle's graph with any formats.

    Args:
        model: in eval mode; may be on the meta device.
        weights: where its parameters are read from.
        target: what to build for.
        calibration: windows of token ids to choose with.
        held_out: windows of token ids to judge with, none of them among the others.
        hidden: the graph's output for hidden states; None: it gives none.
        tuning: how the codes of each build are tuned; None: not at all.
        caches: states that each build keeps in fewer bits: what that costs is part of what is measured.
    """

    model: LanguageModel
    weights: Weights
    target: Target
    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    hidden: TensorSpec | None = None
    tuning: Tuning | None = None
    caches: NarrowCaches = field(default_factory=NarrowCaches)

    def graph(self) -> ir.Model:
        """A captured graph after the target's passes."""
        return prepare(capture(self.model, self.weights, hidden=self.hidden is not None), self.target)

    def largest(self, progress: Progress) -> dict[str, Any]:
        """The magnitudes of layers' inputs, which smoothing goes by."""
        return largest_inputs(self._module, self.calibration, partial(progress, "looking at inputs"), self.weights)

    def build(
        self, schemes: Mapping[str, Scheme], largest: Mapping[str, Any], directory: Path, progress: Progress
    ) -> Built:
        """Write the graph with those formats."""
        captured = self.graph()
        done = smoothed(captured, largest)
        paths = list(layer_modules(self._module))
        plan = plan_of(
            schemes, done, self._module, self.calibration, progress, self.weights, layers=paths, scratch=directory
        )  # fmt: skip
        if self.tuning is not None:
            plan = tuned(plan, self._module, self.weights, paths, [captured], self.tuning, progress)
        plan.caches = self.caches
        give_back()
        self._write(captured, plan, directory, progress)
        return Built(sum(file.stat().st_size for file in directory.iterdir()), plan)

    def weigh(self, schemes: Mapping[str, Scheme], directory: Path) -> int:
        """Bytes of the graph's files with those formats, whatever their codes; nothing is left in the directory."""
        with tempfile.TemporaryDirectory(dir=directory) as room:
            plan = Plan(schemes, _any_codes, caches=self.caches, by_rows=frozenset(schemes))
            self._write(self.graph(), plan, Path(room), lambda what, share: None)
            return sum(file.stat().st_size for file in Path(room).iterdir())

    def measure(self, directory: Path, progress: Progress) -> ParityReport:
        """Compare a built graph with the float model on the held-out text."""
        progress("verifying on held-out text", 0.0)
        signature = self.caches.declared(signature_of(self.model, self.hidden))
        session = Session(
            step_backend(directory / GRAPH, signature), signature, max_context=self.model.config.max_context,
            ragged_chunks=self.target.ragged_chunks,
        )  # fmt: skip
        with resident(self.model, self.weights):
            return compare(self.model, session, self.held_out, progress=partial(progress, "verifying on held-out text"))

    def _write(self, captured: ir.Model, plan: Plan, directory: Path, progress: Progress) -> None:
        lowered = lower_to(captured, self.target, plan)
        plan.caches.declare(lowered)
        write_graph(lowered, directory, progress)
        plan.forget()

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model


def quantize_within(
    budget: Budget, job: Automatic, directory: Path, other_bytes: int, progress: Progress
) -> Outcome:  # fmt: skip
    """Write the graph with the cheapest formats that keep to a budget, and a report beside it.

    Args:
        budget: to keep to.
        job: what to build.
        directory: of the new bundle.
        other_bytes: of the bundle's files that are known before: the tokenizer's.
        progress: told what is done, and how much of it.

    Raises:
        QuantizeError: nothing keeps to the budget; the text says what could be kept to.
    """
    if not job.calibration or not job.held_out:
        raise QuantizeError("no text to calibrate with and to verify on; give a text with --calibrate")
    check_windows(job.calibration)
    check_library()
    graph = job.graph()
    uses = Uses(graph)
    candidates = candidates_of(
        uses, integer_products=budget.prefer == "prefill", tuned=job.tuning is not None,
        narrow_scales=job.target.narrow_scales,
    )  # fmt: skip
    if not candidates:
        raise QuantizeError("the model has no weight whose rows divide into blocks of 32; export it without --quantize")
    narrow = {c.name for c in candidates if any(scheme.scale_bits == 8 for scheme in c.schemes)}
    held = smallest_holding(uses.tensors, uses.ends, partial(progress, "looking at weights"), narrow=narrow)
    largest = {} if _was_quantized(uses, held) else job.largest(progress)
    done = smoothed(graph, largest)
    floats = _bytes_of_floats(graph, candidates) + _NODE_BYTES * len(graph.graph)
    del graph
    predictions = sensitivities(
        job.model, job.weights, candidates, done, job.calibration,  # type: ignore[arg-type]
        rounds_inputs=ort.DOMAIN in job.target.domains, tuned=job.tuning is not None, scratch=directory,
        progress=progress,
    )  # fmt: skip
    predictions = none_better_than_held(candidates, predictions, held)
    table = table_of(candidates, predictions, budget.prefer, budget.rates)
    give_back()
    measured = MeasuredSearch(budget, job, table, largest, directory, floats, other_bytes)
    try:
        attempt = measured.run(progress)
    except QuantizeError as error:
        if not job.caches:
            raise
        raise QuantizeError(f"{error}; or leave the cache in {job.caches.dtype} out, whose cost is in it") from error
    evidence = Evidence(budget, candidates, predictions, tuple(measured.attempts), attempt, measured.rest)
    (directory / REPORT).write_text(write_table(evidence), encoding="utf-8")
    progress("drawing the front", 0.0)
    draw_front(evidence, directory / PICTURE)
    tuning = {"tuning": dict(measured.plan.tuned)} if measured.plan.tuned else {}
    record = _record(budget, attempt) | tuning | job.caches.record
    return Outcome(attempt.choice.schemes, record, measured.plan)


def none_better_than_held(
    candidates: Sequence[FormatChoices], predictions: Mapping[str, Mapping[Scheme, float]], held: Mapping[str, Scheme]
) -> dict[str, dict[Scheme, float]]:
    """Predictions in which no format is better than a smaller one that holds the checkpoint's own values.

    Such a format loses nothing, so what an estimate from some hundred tokens tells between the two is its noise.
    """
    found = {name: dict(costs) for name, costs in predictions.items()}
    for candidate in candidates:
        own, costs = held.get(candidate.name), found[candidate.name]
        if own in costs:
            least, size = costs[own], own.nbytes(*candidate.shape)
            costs |= {s: max(kl, least) for s, kl in costs.items() if s.nbytes(*candidate.shape) > size}
    return found


def _any_codes(name: str, weight: NDArray[np.float32], scheme: Scheme) -> Codes:
    """Numbers that take as many bytes as any others, chosen in no time."""
    rows, blocks = len(weight), scheme.blocks(weight.shape[1])
    width = weight.shape[1] if scheme.block == ROW else blocks * scheme.block
    zeros = np.full((rows, blocks), scheme.middle, dtype=np.uint8)
    columns = weight.shape[1] if scheme.shifted else 0
    return Codes(np.zeros((rows, width), np.uint8), np.ones((rows, blocks), np.float32), zeros, columns)


def _was_quantized(uses: Uses, held: Mapping[str, Scheme]) -> bool:
    """Whether most weights are on some 4-bit grid already: smoothing would take them off it, at a loss."""
    few = sum(math.prod(uses.shapes[name]) for name, scheme in held.items() if scheme.bits < 8)
    return few > _MOST * sum(map(math.prod, uses.shapes.values()))


def _bytes_of_floats(graph: ir.Model, candidates: Sequence[FormatChoices]) -> int:
    """Of what is left as it is; the parts of merged weights are still there, but nothing reads them."""
    names = {c.name for c in candidates}
    values = [v for v in graph.graph.initializers.values() if v.name not in names and v.uses()]
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _record(budget: Budget, attempt: Attempt) -> dict[str, Any]:
    report = attempt.report
    return {
        "rounding": "GPTQ below 8 bits, except shifted formats, embeddings and recurrent weights; else to nearest",
        "weights": dict(Counter(map(str, attempt.choice.schemes.values()))),
        "budget": {key: value for key, value in dataclasses.asdict(budget).items() if key != "rates" or value},
        "predicted_kl": attempt.predicted,
        "held_out": {
            "tokens": report.tokens, "kl": report.kl, "kl_p99": report.kl_p99, "top1": report.top1,
            "perplexity": report.perplexity, "reference_perplexity": report.reference_perplexity,
        },
    }  # fmt: skip
