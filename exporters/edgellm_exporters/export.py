"""The pipeline: capture, passes, quantize, lower, write, prove. Its order is here; each step is elsewhere."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgellm.models.protocol import LanguageModel
from edgellm_exporters.atomic import check_destination, whole_directory
from edgellm_exporters.capture import capture, check_model, signature_of
from edgellm_exporters.errors import ExportError, ParityError
from edgellm_exporters.goldens import write_goldens
from edgellm_exporters.lower import clean, lower_to
from edgellm_exporters.parity import ParityReport, compare
from edgellm_exporters.quantize.calibrate import calibrate
from edgellm_exporters.quantize.methods import METHODS, plan_for
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.samples import golden_rows
from edgellm_exporters.targets import Target, find_target
from edgellm_exporters.write import Progress, write_graph
from edgellm_runtime.backends.ort import library
from edgellm_runtime.bundle import GRAPH, MANIFEST, Bundle, FileInfo, Manifest, TokenizerInfo, sha256_of
from edgellm_runtime.loading import open_session
from edgellm_runtime.session import Session
from edgellm_runtime.verify import Verification, verify

__all__ = ["ExportOptions", "Exported", "TextAssets", "export"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make.

    Args:
        target: a name in :data:`edgellm_exporters.targets.TARGETS`.
        dtype: of activations and unquantized weights.
        quantize: a name in :data:`edgellm_exporters.quantize.methods.METHODS`.
        name: what the bundle calls itself; the destination's name if empty.
        calibration: windows of token ids, each up to the model's context; with them, weights of fewer than 8 bits are
            quantized with GPTQ.
        bounds: overrides for what the bundle must hold to.
    """

    target: str = "cpu"
    dtype: str = "float32"
    quantize: str = "none"
    name: str = ""
    calibration: Sequence[Sequence[int]] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        target = find_target(self.target)
        if self.dtype not in target.dtypes:
            raise ExportError(f"target {self.target} has no dtype {self.dtype!r}; it has {', '.join(target.dtypes)}")
        if self.quantize not in METHODS:
            raise ExportError(f"unknown quantization {self.quantize!r}; there are {', '.join(METHODS)}")


@dataclass(frozen=True, kw_only=True)
class TextAssets:
    """What turns text into tokens and back; copied into the bundle."""

    tokenizer_json: str
    chat_template: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False

    @property
    def info(self) -> TokenizerInfo:
        """What the manifest says of it."""
        return TokenizerInfo(self.bos_token_id, self.eos_token_ids, self.add_bos, self.chat_template is not None)


@dataclass(frozen=True)
class Exported:
    """A finished bundle and the evidence for it."""

    bundle: Bundle
    parity: ParityReport
    verification: Verification
    parameters: int
    weight_bytes: int


def export(
    model: LanguageModel, destination: str | Path, *, options: ExportOptions | None = None,
    text: TextAssets | None = None, provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda what, share: None,
) -> Exported:  # fmt: skip
    """Make a bundle that computes what the model computes, and prove it before it appears.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`.
        destination: the bundle's directory; a bundle that is there is replaced when the new one is finished.
        options: what to make.
        text: tokenizer and chat template; None for a model of token ids only.
        provenance: where the model came from, for the manifest.
        progress: told what is being done and how much of it.

    Returns:
        The opened bundle with its parity report.

    Raises:
        ExportError: the model cannot be captured, lowered or quantized, the disk is full, or the result is not equal
            (:class:`ParityError`). No bundle is left behind.
    """
    options, destination = options or ExportOptions(), Path(destination)
    check_destination(destination)
    check_model(model)
    library()  # the proof at the end needs it, so its absence is told now
    assert isinstance(model, nn.Module)
    was_training = model.training
    model.eval()
    try:
        with whole_directory(destination) as scratch:
            name = options.name or destination.name
            exported = _build(model, scratch, name, options, text, dict(provenance or {}), progress)
    finally:
        model.train(was_training)
    bundle = Bundle(destination, checksums=False)
    return Exported(bundle, exported.parity, exported.verification, exported.parameters, exported.weight_bytes)


def _build(
    model: LanguageModel, scratch: Path, name: str, options: ExportOptions, text: TextAssets | None,
    provenance: Mapping[str, Any], progress: Progress,
) -> Exported:  # fmt: skip
    target = find_target(options.target)
    progress("capturing", 0.0)
    graph, plan = _graph(model, target, options, progress)
    parameters = sum(p.numel() for _, p in model.named_parameters())
    write_graph(graph, scratch, progress)
    progress("taking goldens from PyTorch", 0.0)
    rows = golden_rows(text.tokenizer_json if text else None, model.config.vocab_size, model.config.max_context)
    write_goldens(model, rows, scratch)
    _write_text(scratch, text)
    bounds = {**METHODS[options.quantize].bounds, **options.bounds}
    manifest = Manifest(
        name=name, target={"name": target.name, "requires": {"onnxruntime": "1.30"}},
        signature=signature_of(model), max_context=model.config.max_context, ragged_chunks=target.ragged_chunks,
        dtype=options.dtype, files={}, tokenizer=text.info if text else None,
        quantization=_quantization(options, plan), provenance={**provenance, **_environment()}, bounds=bounds,
    )  # fmt: skip
    _write_manifest(scratch, manifest)
    bundle = Bundle(scratch)
    session = open_session(bundle)
    parity, verification = _prove(model, bundle, session, rows, progress)
    measured = {k: getattr(parity, k) for k in ("logits", "kl", "top1", "state", "greedy")} | {"tokens": parity.tokens}
    _write_manifest(scratch, manifest, measured)
    weights = sum(f.bytes for n, f in bundle.manifest.files.items() if n.startswith(GRAPH))
    return Exported(bundle, parity, verification, parameters, weights)


def _graph(model: LanguageModel, target: Target, options: ExportOptions, progress: Progress) -> tuple[ir.Model, Plan]:
    captured = capture(model)
    clean(captured)
    for make in target.passes:
        make()(captured)
    calibration = None
    if options.calibration:
        assert isinstance(model, nn.Module)
        calibration = calibrate(model, options.calibration, partial(progress, "calibrating"))
    plan = plan_for(options.quantize, captured, calibration)
    return lower_to(captured, target, plan), plan


def _prove(
    model: LanguageModel, bundle: Bundle, session: Session, rows: Sequence[Sequence[int]], progress: Progress
) -> tuple[ParityReport, Verification]:
    progress("comparing with PyTorch", 0.0)
    prompts = [row[: len(row) // 2] for row in rows]
    parity = compare(model, session, rows, greedy_prompts=prompts, progress=partial(progress, "comparing with PyTorch"))
    progress("verifying goldens", 0.0)
    verification = verify(bundle, session)
    failed = [c for c in (*parity.checks(dict(bundle.manifest.bounds)), *verification.checks) if not c.ok]
    if failed:
        figures = "; ".join(f"{c.name} is {c.value:.3g}, bound {c.bound:.3g}" for c in failed)
        raise ParityError(f"the bundle does not compute what PyTorch computes: {figures}; no bundle was written")
    return parity, verification


def _write_text(scratch: Path, text: TextAssets | None) -> None:
    if text is None:
        return
    (scratch / "tokenizer.json").write_text(text.tokenizer_json, encoding="utf-8")
    if text.chat_template is not None:
        (scratch / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8")


def _write_manifest(scratch: Path, manifest: Manifest, measured: Mapping[str, float] | None = None) -> None:
    files = {
        f.name: FileInfo(f.stat().st_size, sha256_of(f)) for f in sorted(scratch.iterdir()) if f.name != MANIFEST
    }  # fmt: skip
    full = dataclasses.replace(manifest, files=files, measured=measured or {})
    (scratch / MANIFEST).write_text(json.dumps(full.to_json(), indent=1) + "\n", encoding="utf-8")


def _quantization(options: ExportOptions, plan: Plan) -> dict[str, Any]:
    if not plan.schemes:
        return {"method": "none"}
    counted = dict(collections.Counter(map(str, plan.schemes.values())))
    rounding = "GPTQ" if options.calibration else "round to nearest"
    return {"method": options.quantize, "rounding": rounding, "weights": counted}


def _environment() -> dict[str, str]:
    import onnx
    import onnxruntime

    import edgellm

    return {
        "edgellm": edgellm.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
