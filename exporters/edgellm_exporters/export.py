"""The pipeline: capture, passes, quantize, lower, write, prove. Its order is here; each step is elsewhere."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgellm.models.protocol import LanguageModel, answers_sources, logit_width, reads_in_one_pass
from edgellm.streaming import OwnWeights, Weights, resident
from edgellm_exporters.atomic import check_destination, whole_directory
from edgellm_exporters.auto.automatic import Automatic, quantize_within
from edgellm_exporters.auto.budget import AUTO, bounds_of
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.tensorrt import check_engine_options
from edgellm_exporters.errors import ExportError, ParityError, QuantizeError
from edgellm_exporters.graph.capture import capture, check_model, hidden_of, signature_of
from edgellm_exporters.graph.capture_encoder import Graphs, capture_graphs
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.graph.lower import kernel_notes, prepare
from edgellm_exporters.graph.targets import Target, find_target
from edgellm_exporters.graph.write import WEIGHTS_FILE, Progress
from edgellm_exporters.graph_sets import graph_set
from edgellm_exporters.options import ExportOptions, TextAssets, check_encoder_options
from edgellm_exporters.proof.adapters import adapter_traces, adapters_of
from edgellm_exporters.proof.bounds import bounds_with_a_favourite, held_by
from edgellm_exporters.proof.draft_graph import check_drafter, write_drafter
from edgellm_exporters.proof.far_row import FarStart, far_row, far_start
from edgellm_exporters.proof.goldens import GREEDY, write_goldens
from edgellm_exporters.proof.layer_bounds import layers_in
from edgellm_exporters.proof.measured_bounds import with_measured_bounds
from edgellm_exporters.proof.opened import open_proof
from edgellm_exporters.proof.parity import ParityReport, measure, unequal
from edgellm_exporters.proof.receipt import check_receipt, measured_receipt
from edgellm_exporters.proof.same_numbers import ExactTraces, exact_traces
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.proof.stand_in import bounds_in, proved_on, stand_in, stand_in_session
from edgellm_exporters.proof.text import TEMPLATE, TOKENIZER, check_text
from edgellm_exporters.proof.torch_backend import encoder_info
from edgellm_exporters.proof.traces import Continuation, Sources, Trace, take_traces
from edgellm_exporters.quantize.cache import narrowed
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.notes import quantization_notes
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.record import recorded
from edgellm_exporters.quantize.tuning.layer_stream import check_layers
from edgellm_exporters.quantize.tuning.store import forget
from edgellm_exporters.quantize.tuning.tune import tuned
from edgellm_exporters.weights.memory import give_back
from edgellm_exporters.weights.widened import widened
from edgellm_runtime.backends.ort import library
from edgellm_runtime.bundle import GRAPH, MANIFEST, Bundle, FileInfo, Manifest, sha256_of
from edgellm_runtime.checks.meaning import MEANING, meaning_of
from edgellm_runtime.checks.verify import Verification, verify
from edgellm_runtime.errors import OptionError
from edgellm_runtime.option_ranges import check_defaults
from edgellm_runtime.session import Session
from edgellm_runtime.spec import Signature, TensorSpec

_ADAPTER_ROWS = 2  # goldens of each adapter
__all__ = ["ExportOptions", "Exported", "TextAssets", "export"]

_FLOAT_ONLY = "float_reference_only"  # in the manifest's quantization: why it has no goldens of the same numbers
_CACHE_WINDOWS = 4  # of the calibration text: ranges need less of it than codes do


@dataclass(frozen=True)
class Exported:
    """A finished bundle and the evidence for it; ``notes`` are what a person should know of it."""

    bundle: Bundle
    parity: ParityReport
    verification: Verification
    parameters: int
    weight_bytes: int
    notes: tuple[str, ...] = ()


def export(
    model: LanguageModel, destination: str | Path, *, weights: Weights | None = None,
    options: ExportOptions | None = None, text: TextAssets | None = None, provenance: Mapping[str, Any] | None = None,
    force: bool = False, progress: Progress = lambda what, share: None,
) -> Exported:  # fmt: skip
    """Make a bundle that computes what the model computes, and prove it before it appears.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`.
        destination: the bundle's directory: nothing yet, an empty one or, with ``force``, a bundle.
        weights: where the parameters of a model on the meta device are read from, one by one, so that memory does not
            grow with the model; None for a model that holds them.
        options: what to make.
        text: tokenizer and chat template; None for a model of token ids only.
        provenance: where the model came from, for the manifest.
        force: replace a bundle that is there when the new one is finished; other files are never replaced.
        progress: told what is being done and how much of it.

    Returns:
        The opened bundle with its parity report.

    Raises:
        ExportError: the model cannot be captured, lowered or quantized, the disk is full, or the result is not equal
            (:class:`ParityError`). No bundle is left behind.
    """
    options, destination = options or ExportOptions(), Path(destination)
    check_destination(destination, force=force)
    check_model(model)
    generation = _checked_generation(options.generation, model, text)
    options = dataclasses.replace(options, generation=generation)
    if options.receipt is not None:
        check_receipt(model, text is not None, options.dtype)
    library()  # the proof at the end needs it, so its absence is told now
    if answers_sources(model):
        check_encoder_options(options)
    if options.drafter is not None:
        check_drafter(options.drafter, options.target, model.config.vocab_size, hidden=options.hidden)
    if find_target(options.target).roles:
        check_engine_options(options.engine or EngineOptions(), {"method": options.quantize})
    assert isinstance(model, nn.Module)
    if options.tuning is not None:
        check_layers(model, list(layer_modules(model)))
    was_training = model.training
    model.eval()
    gc.freeze()  # what is there stays: each look at PyTorch's own objects takes a tenth of a second and more
    try:
        with whole_directory(destination, force=force) as scratch, widened(model) as note:
            name = options.name or destination.name
            source = weights or OwnWeights(model)
            exported = _build(model, source, scratch, name, options, text, dict(provenance or {}), progress)
    finally:
        model.train(was_training)
        gc.unfreeze()
    if options.tuning is not None and options.tuning.directory is not None:
        forget(options.tuning.directory)
    notes = (*exported.notes, note) if note else exported.notes
    return dataclasses.replace(exported, bundle=Bundle(destination, checksums=False), notes=notes)


def _build(
    model: LanguageModel, weights: Weights, scratch: Path, name: str, options: ExportOptions, text: TextAssets | None,
    provenance: Mapping[str, Any], progress: Progress,
) -> Exported:  # fmt: skip
    target = find_target(options.target)
    whole, most = reads_in_one_pass(model.config), model.config.max_context
    made = graph_set(target, options.dtype, options.engine, most, one_pass=whole)
    progress("capturing", 0.0)
    _write_text(scratch, text)
    if text is not None:
        check_text(scratch, text.info, text.task, model.config.vocab_size)
    golden = golden_rows(text.tokenizer_json if text else None, model.config.vocab_size, made.context)
    (rows, note), sources, encoder = golden, None, encoder_info(model)
    if encoder is not None:
        rows, sources = golden.answering(encoder.start, encoder.max_source)
    with stand_in(scratch, options.dtype) as standing_in:
        write = partial(made.write, directory=scratch, stand_in=standing_in, progress=progress)
        notes = [note] if note else []
        quantization, own_bounds, plan, hidden = _write_weights(
            model, weights, target, options, rows, scratch, write, notes, progress
        )  # fmt: skip
        signature = _signature(model, plan.caches, options.dtype, target, hidden)
        bounds = {**bounds_in(held_by(own_bounds, signature, options.dtype), options.dtype), **options.bounds}
        labels = logit_width(model.config) != model.config.vocab_size  # which are nothing to go on with
        unasked = {"greedy": labels, "hidden": hidden is None, "split": signature.one_pass}
        bounds = {name: bound for name, bound in bounds.items() if not unasked.get(name)}
        manifest = Manifest(
            name=name, target={"name": target.name, "requires": dict(target.requires)},
            signature=signature, max_context=made.context, ragged_chunks=target.ragged_chunks,
            dtype=options.dtype, files={}, tokenizer=text.info if text else None,
            quantization=quantization, bounds=bounds,
            provenance={**provenance, **_environment(), "proved_on": proved_on(options.dtype)},
            task=text.task if text else None, generation=options.generation, vocab_size=model.config.vocab_size,
            graphs=made.graphs, capacity=made.capacity, encoder=encoder,
            adapters=adapters_of(model),
        )  # fmt: skip
        manifest = _write_manifest(scratch, manifest)
        open_one = partial(_session, scratch)
        if standing_in is not None:
            open_one = partial(stand_in_session, standing_in, manifest)
        give_back()
        progress("running PyTorch", 0.0)
        with resident(model, weights):
            traces, said = take_traces(
                model, open_one, rows, GREEDY, whole="greedy" in bounds, max_context=made.context, sources=sources
            )  # fmt: skip
            switched = adapter_traces(model, rows[:_ADAPTER_ROWS])
            made_up = standing_in is None and sources is None
            start = far_start(model, traces[0], made.context, rounds=bool(plan.caches)) if made_up else None
            far = None if start is None or plan.rounds else far_row(model, start)
            info = text.info if text else None
            receipt = measured_receipt(model, open_one, scratch, info, options.receipt, progress)
        bounds = {**bounds_with_a_favourite(bounds, traces), MEANING: 0.0}
        give_back()
        same, manifest = _same_numbers(
            model, weights, plan, dataclasses.replace(manifest, bounds=bounds), rows, start, progress, sources, scratch
        )
        manifest = _write_manifest(scratch, manifest)
        far = far or same.far
        steps = [role.file for role in made.graphs.values()] or [GRAPH]
        layers = layers_in(scratch, steps, traces[0]) if standing_in is None else []
        means, shown = meaning_of(Bundle(scratch, checksums=False)), options.hidden
        write_goldens(traces, said, scratch, same.rows, means, layers, far, switched, hidden=shown)
        manifest = _write_manifest(scratch, manifest)
        del plan
        same = same.without_logits()
        give_back()
        parity, verification = _prove(Bundle(scratch), open_one(), traces, said, progress)
        first = traces[0].without_logits()
        del traces
    measured = {k: getattr(parity, k) for k in ("logits", "kl", "top1", "state", "greedy")} | {"tokens": parity.tokens}
    manifest, exact = with_measured_bounds(scratch, manifest, same, first, layers, far)
    measured |= exact
    manifest = _write_manifest(scratch, dataclasses.replace(manifest, measured=measured, receipt=receipt))
    manifest = _write_manifest(scratch, made.finish(scratch, manifest, progress))
    if options.drafter is not None:
        manifest = write_drafter(
            options.drafter.eval(), target, scratch, manifest, first, progress, write_manifest=_write_manifest,
            rounds=options.quantize != "none",
        )  # fmt: skip
    weight_bytes = sum(manifest.files[n].bytes for n in (*manifest.graph_files, WEIGHTS_FILE))
    opened = Bundle(scratch, checksums=False)
    notes += quantization_notes(quantization)
    if why := manifest.quantization.get(_FLOAT_ONLY):
        notes.append(f"its goldens are the float model's alone, and hold it to their distance: {why}")
    parameters = sum(p.numel() for _, p in model.named_parameters())
    return Exported(opened, parity, verification, parameters, weight_bytes, tuple(notes))


def _checked_generation(options: Mapping[str, Any], model: LanguageModel, text: TextAssets | None) -> dict[str, Any]:
    try:
        found = check_defaults(options, model.config.vocab_size)
    except OptionError as error:
        raise ExportError(f"generation: {error}; correct it, in a checkpoint's generation_config.json") from error
    if text is None and found.get("stop"):
        raise ExportError(f"generation: stop is {found['stop']!r}, but there is no tokenizer; leave stop out")
    return found


def _same_numbers(
    model: LanguageModel, weights: Weights, plan: Plan, manifest: Manifest, rows: Sequence[Sequence[int]],
    start: FarStart | None, progress: Progress, sources: Sources, scratch: Path,
) -> tuple[ExactTraces, Manifest]:  # fmt: skip
    """PyTorch's traces with the numbers of a quantized bundle; in the manifest, why there are none."""
    if not plan.rounds:
        return ExactTraces(), manifest
    progress("running PyTorch with the same numbers", 0.0)
    try:
        name = manifest.target["name"]
        return exact_traces(model, weights, plan, name, rows, sources, start, scratch), manifest
    except QuantizeError as error:
        said = {**manifest.quantization, _FLOAT_ONLY: str(error)}
        return ExactTraces(), dataclasses.replace(manifest, quantization=said)


def _write_weights(
    model: LanguageModel, weights: Weights, target: Target, options: ExportOptions, rows: Sequence[Sequence[int]],
    scratch: Path, write: Callable[[Graphs, Plan], None], notes: list[str], progress: Progress,
) -> tuple[dict[str, Any], Mapping[str, float], Plan, TensorSpec | None]:  # fmt: skip
    """The graph with its weights into ``scratch``; what the manifest says, bounds, plan, output of hidden states."""
    if options.budget is None:
        graphs, plan = _planned(model, weights, target, options, rows, scratch, notes, progress)
        hidden = hidden_of(graphs.step)
        write(graphs, plan)
        plan.forget()
        record = recorded(plan, options.quantize)
        return record, find_method(options.quantize, target.methods).bounds, plan, hidden
    hidden = hidden_of(capture(model, weights, hidden=True)) if options.hidden else None
    job = Automatic(
        model=model, weights=weights, target=target, calibration=options.calibration, held_out=options.held_out,
        hidden=hidden, tuning=options.tuning,
    )  # fmt: skip
    others = sum(file.stat().st_size for file in scratch.iterdir())
    job = dataclasses.replace(job, caches=_caches(job.graph(), model, weights, target, options, rows, notes, progress))
    found = quantize_within(options.budget, job, scratch, others, progress)
    return {"method": AUTO, **found.record}, bounds_of(options.budget, found.schemes), found.plan, hidden


def _planned(
    model: LanguageModel, weights: Weights, target: Target, options: ExportOptions, rows: Sequence[Sequence[int]],
    scratch: Path, notes: list[str], progress: Progress,
) -> tuple[Graphs, Plan]:  # fmt: skip
    """The graphs before lowering, and which of its weights to quantize how; to ``notes``, what lacks a kernel."""
    graphs = capture_graphs(model, weights, hidden=options.hidden)
    for each in graphs.all:
        prepare(each, target)
    captured = graphs.step
    caches = _caches(captured, model, weights, target, options, rows, notes, progress)
    give_back()
    gc.freeze()  # so too what tracing made PyTorch keep
    assert isinstance(model, nn.Module)
    method = find_method(options.quantize, target.methods)
    plan = make_plan(
        method, captured, model, rows, options.calibration, progress, weights, encoder=graphs.encoder,
        layers=list(layer_modules(model)), scratch=scratch,
    )  # fmt: skip
    plan.caches = caches
    if options.tuning is not None:
        plan = tuned(plan, model, weights, list(layer_modules(model)), graphs.all, options.tuning, progress)
    give_back()
    return graphs, plan


def _caches(
    captured: ir.Model, model: LanguageModel, weights: Weights, target: Target, options: ExportOptions,
    rows: Sequence[Sequence[int]], notes: list[str], progress: Progress,
) -> NarrowCaches:  # fmt: skip
    """The states that the bundle keeps in fewer bits; to ``notes``, what of a graph lacks a kernel."""
    notes += (lacking := kernel_notes(captured, target))
    if options.kv_cache == "float32":
        return NarrowCaches()
    if lacking:
        raise ExportError(f"such a cache needs target {target.name}'s kernel, but {lacking[0]}; leave --kv-cache out")
    progress("looking at keys and values", 0.0)
    seen = options.calibration[:_CACHE_WINDOWS] or rows
    even = [row for row in seen if len(row) == len(seen[0])]
    return narrowed(options.kv_cache, captured, model, weights, target.narrow_caches, even)


def _signature(
    model: LanguageModel, caches: NarrowCaches, dtype: str, target: Target, hidden: TensorSpec | None
) -> Signature:
    """The model's, with the state in the target's precision or, where it is kept in fewer bits, in that."""
    whole = signature_of(model, hidden)
    state = tuple(dataclasses.replace(s, dtype=dtype if s.dtype == "float32" else s.dtype) for s in whole.state)
    return caches.declared(dataclasses.replace(whole, inputs=(*whole.inputs, *target.inputs), state=state))


def _session(scratch: Path) -> Session:
    # its bytes were hashed while they were written; wherever it is to run, it is proved here
    return open_proof(Bundle(scratch, checksums=False))


def _prove(
    bundle: Bundle, session: Session, traces: Sequence[Trace], said: Sequence[Continuation], progress: Progress
) -> tuple[ParityReport, Verification]:
    progress("comparing with PyTorch", 0.0)
    parity = measure(session, traces, len(traces), said, partial(progress, "comparing with PyTorch"))
    progress("verifying goldens", 0.0)
    verification = verify(bundle, session, measured=False)
    checks = (*parity.checks(dict(bundle.manifest.bounds)), *verification.checks)
    if any(not check.ok for check in checks):
        how = bundle.manifest.quantization
        caches = how.get("cache_dtype", "int8") if "cache" in how else ""
        raise ParityError(unequal(checks, bundle.manifest.dtype, how.get("method", "none"), caches))
    return parity, verification


def _write_text(scratch: Path, text: TextAssets | None) -> None:
    if text is None:
        return
    (scratch / TOKENIZER).write_text(text.tokenizer_json, encoding="utf-8")
    if text.chat_template is not None:
        (scratch / TEMPLATE).write_text(text.chat_template, encoding="utf-8")


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
