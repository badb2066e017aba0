"""The pipeline: capture, passes, quantize, lower, write, prove. Its order is here; each step is elsewhere."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellm.models.protocol import LanguageModel, logit_width, reads_in_one_pass
from edgellm.streaming import Weights, resident
from edgellm_exporters.errors import ParityError, QuantizeError
from edgellm_exporters.graph.capture import signature_of
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.graph.write import WEIGHTS_FILE, Progress
from edgellm_exporters.graph_sets import graph_set
from edgellm_exporters.graph_writer import GraphWriter, Quantized
from edgellm_exporters.options import ExportOptions, TextAssets
from edgellm_exporters.proof.adapters import adapter_traces, adapters_of
from edgellm_exporters.proof.bounds import bounds_with_a_favourite, held_by
from edgellm_exporters.proof.draft_graph import write_drafter
from edgellm_exporters.proof.far_row import FarRow, FarStart, far_row, far_start
from edgellm_exporters.proof.goldens import GREEDY, write_goldens
from edgellm_exporters.proof.layer_bounds import layers_in
from edgellm_exporters.proof.measured_bounds import with_measured_bounds
from edgellm_exporters.proof.opened import open_proof
from edgellm_exporters.proof.parity import ParityReport, measure, unequal
from edgellm_exporters.proof.receipt import measured_receipt
from edgellm_exporters.proof.same_numbers import ExactTraces, exact_traces
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.proof.stand_in import bounds_in, proved_on, stand_in, stand_in_session
from edgellm_exporters.proof.text import TEMPLATE, TOKENIZER, check_text
from edgellm_exporters.proof.torch_backend import encoder_info
from edgellm_exporters.proof.traces import Continuation, Trace, take_traces
from edgellm_exporters.quantize.notes import quantization_notes
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.backends.ort import library
from edgellm_runtime.bundle import GRAPH, MANIFEST, Bundle, FileInfo, Manifest, sha256_of
from edgellm_runtime.checks.meaning import MEANING, meaning_of
from edgellm_runtime.checks.verify import Verification, verify
from edgellm_runtime.session import Session
from edgellm_runtime.spec import Signature

__all__ = ["Exported", "Pipeline"]

_ADAPTER_ROWS = 2  # goldens of each adapter
_MEASURED = ("logits", "kl", "top1", "state", "greedy", "tokens")  # of a parity report, in the manifest
_FLOAT_ONLY = "float_reference_only"  # in the manifest's quantization: why it has no goldens of the same numbers


@dataclass(frozen=True)
class Exported:
    """A finished bundle and the evidence for it; ``notes`` are what a person should know of it."""

    bundle: Bundle
    parity: ParityReport
    verification: Verification
    parameters: int
    weight_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """What PyTorch and the bundle are both given: golden rows, and what they answer where the model answers sources."""

    tokens: Sequence[Sequence[int]]
    sources: Sequence[Sequence[int]] | None


@dataclass(frozen=True)
class _Reference:
    """What PyTorch computes with the float weights.

    Args:
        traces: of the golden rows.
        said: after each.
        switched: traces of some of them with each adapter.
        start: of a row far into the context; None for no such row.
        far: that row, of bundles whose numbers are the model's own.
        receipt: what the manifest says of a text that both have read.
    """

    traces: list[Trace]
    said: list[Continuation]
    switched: Mapping[str, list[Trace]]
    start: FarStart | None
    far: FarRow | None
    receipt: dict[str, Any]

    def without_logits(self) -> _Reference:
        """What is left when they have been looked at: of the first row."""
        return dataclasses.replace(self, traces=[self.traces[0].without_logits()], switched={})


class Pipeline:
    """One bundle in the making.

    Args:
        model: in eval mode; its parameters may be on the meta device.
        weights: where they are read.
        scratch: the directory that becomes the bundle.
        name: what the bundle calls itself.
        options: what to make, checked.
        text: tokenizer and chat template; None for a model of token ids only.
        provenance: where the model came from, for the manifest.
        progress: told what is being done and how much of it.
    """

    _manifest: Manifest  # from the time that the graphs are written

    def __init__(
        self, model: LanguageModel, weights: Weights, scratch: Path, name: str, options: ExportOptions,
        text: TextAssets | None, provenance: Mapping[str, Any], progress: Progress,
    ) -> None:  # fmt: skip
        self._model, self._weights, self._scratch, self._name = model, weights, scratch, name
        self._options, self._text, self._provenance, self._progress = options, text, provenance, progress
        self._target = find_target(options.target)
        most, whole = model.config.max_context, reads_in_one_pass(model.config)
        self._graphs = graph_set(self._target, options.dtype, options.engine, most, one_pass=whole)
        self._encoder = encoder_info(model)
        self._notes: list[str] = []

    def run(self) -> Exported:
        """Write the bundle's files and prove them.

        Raises:
            ExportError: as for :func:`edgellm_exporters.export.export`.
        """
        self._progress("capturing", 0.0)
        self._write_text()
        rows = self._golden_rows()
        with stand_in(self._scratch, self._options.dtype) as standing_in:
            quantized = self._write_graphs(rows, standing_in)
            open_one = self._opener(standing_in)
            give_back()
            reference = self._run_pytorch(rows, quantized.plan, open_one, stands_in=standing_in is not None)
            give_back()
            same = self._run_with_same_numbers(rows, quantized.plan, reference)
            layers = self._layers(reference) if standing_in is None else []
            self._write_goldens(reference, same, layers)
            del quantized  # codes are as many as the weights
            same = same.without_logits()
            give_back()
            parity, verification = self._prove(open_one(), reference)
            reference = reference.without_logits()
        self._keep_measured(reference, same, layers)
        self._finish(reference)
        return self._exported(parity, verification)

    def _write_text(self) -> None:
        """Tokenizer and chat template, which are then tried as a loader will."""
        text = self._text
        if text is None:
            return
        (self._scratch / TOKENIZER).write_text(text.tokenizer_json, encoding="utf-8")
        if text.chat_template is not None:
            (self._scratch / TEMPLATE).write_text(text.chat_template, encoding="utf-8")
        check_text(self._scratch, text.info, text.task, self._model.config.vocab_size)

    def _golden_rows(self) -> _Rows:
        tokenizer = self._text.tokenizer_json if self._text else None
        golden = golden_rows(tokenizer, self._model.config.vocab_size, self._graphs.context)
        self._notes += [golden.note] if golden.note else []
        if self._encoder is None:
            return _Rows(golden.rows, None)
        return _Rows(*golden.answering(self._encoder.start, self._encoder.max_source))

    def _write_graphs(self, rows: _Rows, standing_in: Path | None) -> Quantized:
        """The graphs, their weights and the first manifest."""
        text, options = self._text, self._options
        writer = GraphWriter(
            model=self._model, weights=self._weights, target=self._target, graphs=self._graphs, options=options,
            rows=rows.tokens, scratch=self._scratch, notes=self._notes, progress=self._progress,
        )  # fmt: skip
        quantized = writer.write(standing_in)
        signature = self._signature(quantized)
        self._manifest = Manifest(
            name=self._name, target={"name": self._target.name, "requires": dict(self._target.requires)},
            signature=signature, max_context=self._graphs.context, ragged_chunks=self._target.ragged_chunks,
            dtype=options.dtype, files={}, tokenizer=text.info if text else None, quantization=quantized.record,
            bounds=self._bounds(quantized, signature),
            provenance={**self._provenance, **_environment(), "proved_on": proved_on(options.dtype)},
            task=text.task if text else None, generation=options.generation,
            vocab_size=self._model.config.vocab_size, graphs=self._graphs.graphs, capacity=self._graphs.capacity,
            encoder=self._encoder, adapters=adapters_of(self._model),
        )  # fmt: skip
        self._save()
        return quantized

    def _signature(self, quantized: Quantized) -> Signature:
        """The model's, with the state in the target's precision or, where it is kept in fewer bits, in that."""
        whole, dtype = signature_of(self._model, quantized.hidden), self._options.dtype
        state = tuple(dataclasses.replace(s, dtype=dtype if s.dtype == "float32" else s.dtype) for s in whole.state)
        inputs = (*whole.inputs, *self._target.inputs)
        return quantized.plan.caches.declared(dataclasses.replace(whole, inputs=inputs, state=state))

    def _bounds(self, quantized: Quantized, signature: Signature) -> dict[str, float]:
        """What the bundle must hold to: of what it is asked at all."""
        dtype, config = self._options.dtype, self._model.config
        bounds = {**bounds_in(held_by(quantized.bounds, signature, dtype), dtype), **self._options.bounds}
        labels = logit_width(config) != config.vocab_size  # which are nothing to go on with
        unasked = {"greedy": labels, "hidden": quantized.hidden is None, "split": signature.one_pass}
        return {name: bound for name, bound in bounds.items() if not unasked.get(name)}

    def _opener(self, standing_in: Path | None) -> Callable[[], Session]:
        """Opens what is proved: wherever the bundle is to run, that is done here."""
        if standing_in is not None:
            return partial(stand_in_session, standing_in, self._manifest)
        # its bytes were hashed while they were written
        return lambda: open_proof(Bundle(self._scratch, checksums=False))

    def _run_pytorch(
        self, rows: _Rows, plan: Plan, open_one: Callable[[], Session], *, stands_in: bool
    ) -> _Reference:  # fmt: skip
        self._progress("running PyTorch", 0.0)
        model, context = self._model, self._graphs.context
        with resident(model, self._weights):
            traces, said = take_traces(
                model, open_one, rows.tokens, GREEDY, whole="greedy" in self._manifest.bounds, max_context=context,
                sources=rows.sources,
            )  # fmt: skip
            switched = adapter_traces(model, rows.tokens[:_ADAPTER_ROWS])
            made_up = not stands_in and rows.sources is None
            start = far_start(model, traces[0], context, rounds=bool(plan.caches)) if made_up else None
            far = None if start is None or plan.rounds else far_row(model, start)
            info = self._text.info if self._text else None
            receipt = measured_receipt(model, open_one, self._scratch, info, self._options.receipt, self._progress)
        return _Reference(traces, said, switched, start, far, receipt)

    def _run_with_same_numbers(self, rows: _Rows, plan: Plan, reference: _Reference) -> ExactTraces:
        """PyTorch's traces with the numbers of a quantized bundle; in the manifest, why there are none."""
        same, quantization = ExactTraces(), self._manifest.quantization
        if plan.rounds:
            self._progress("running PyTorch with the same numbers", 0.0)
            try:
                same = exact_traces(
                    self._model, self._weights, plan, self._target.name, rows.tokens, rows.sources, reference.start,
                    self._scratch,
                )  # fmt: skip
            except QuantizeError as error:
                quantization = {**quantization, _FLOAT_ONLY: str(error)}
        bounds = {**bounds_with_a_favourite(self._manifest.bounds, reference.traces), MEANING: 0.0}
        self._save(bounds=bounds, quantization=quantization)
        return same

    def _layers(self, reference: _Reference) -> list[str]:
        """Those whose outputs the graphs name."""
        steps = [role.file for role in self._graphs.graphs.values()] or [GRAPH]
        return layers_in(self._scratch, steps, reference.traces[0])

    def _write_goldens(self, reference: _Reference, same: ExactTraces, layers: list[str]) -> None:
        means = meaning_of(Bundle(self._scratch, checksums=False))
        write_goldens(
            reference.traces, reference.said, self._scratch, same.rows, means, layers, reference.far or same.far,
            reference.switched, hidden=self._options.hidden,
        )  # fmt: skip
        self._save()

    def _prove(self, session: Session, reference: _Reference) -> tuple[ParityReport, Verification]:
        traces, what = reference.traces, "comparing with PyTorch"
        self._progress(what, 0.0)
        parity = measure(session, traces, len(traces), reference.said, partial(self._progress, what))
        # which verifying goes by: of tokens that are nearer than the format's own error none is the likelier
        self._save(measured={k: getattr(parity, k) for k in _MEASURED})
        self._progress("verifying goldens", 0.0)
        bundle = Bundle(self._scratch)
        verification = verify(bundle, session, measured=False)
        checks = (*parity.checks(dict(bundle.manifest.bounds)), *verification.checks)
        if any(not check.ok for check in checks):
            how = bundle.manifest.quantization
            caches = how.get("cache_dtype", "int8") if "cache" in how else ""
            raise ParityError(unequal(checks, bundle.manifest.dtype, how.get("method", "none"), caches))
        return parity, verification

    def _keep_measured(self, reference: _Reference, same: ExactTraces, layers: list[str]) -> None:
        """In the manifest, what else was measured, and the bounds that follow from it."""
        self._manifest, exact = with_measured_bounds(
            self._scratch, self._manifest, same, reference.traces[0], layers, reference.far or same.far
        )
        self._save(measured={**self._manifest.measured, **exact}, receipt=reference.receipt)

    def _finish(self, reference: _Reference) -> None:
        """What is made of proved graphs, and a head that drafts for them."""
        self._manifest = self._graphs.finish(self._scratch, self._manifest, self._progress)
        self._save()
        if self._options.drafter is not None:
            self._manifest = write_drafter(
                self._options.drafter.eval(), self._target, self._scratch, self._manifest, reference.traces[0],
                self._progress, write_manifest=_write_manifest, rounds=self._options.quantize != "none",
            )  # fmt: skip

    def _exported(self, parity: ParityReport, verification: Verification) -> Exported:
        manifest = self._manifest
        weight_bytes = sum(manifest.files[n].bytes for n in (*manifest.graph_files, WEIGHTS_FILE))
        self._notes += quantization_notes(manifest.quantization)
        if why := manifest.quantization.get(_FLOAT_ONLY):
            self._notes.append(f"its goldens are the float model's alone, and hold it to their distance: {why}")
        parameters = sum(p.numel() for _, p in self._model.named_parameters())
        opened = Bundle(self._scratch, checksums=False)
        return Exported(opened, parity, verification, parameters, weight_bytes, tuple(self._notes))

    def _save(self, **changes: Any) -> None:
        """The manifest, with changes, as a file."""
        self._manifest = _write_manifest(self._scratch, dataclasses.replace(self._manifest, **changes))


def _write_manifest(scratch: Path, manifest: Manifest) -> Manifest:
    """Write it with the checksums of files that it does not list yet; the others have not changed."""
    new = [f for f in sorted(scratch.iterdir()) if f.name != MANIFEST and f.name not in manifest.files]
    files = {**manifest.files, **{f.name: FileInfo(f.stat().st_size, sha256_of(f)) for f in new}}
    full = dataclasses.replace(manifest, files=dict(sorted(files.items())))
    (scratch / MANIFEST).write_text(json.dumps(full.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return full


def _environment() -> dict[str, str]:
    import onnx

    import edgellm

    return {
        "edgellm": edgellm.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": library().__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
