"""One row of the table of what engines can be built of: a family's graphs in one precision, proved and built."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import CONTEXT, VOCAB, make, planned
from source_models import SOURCE_FAMILIES
from torch import nn

from edgellm.models.gemma2 import Gemma2, Norm
from edgellm.models.protocol import answers_sources
from edgellm_exporters.engines.fixed_sizes import Sizes, sizes_of, write_roles
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.parser_check import Facts
from edgellm_exporters.engines.tensorrt import build_engine, find_library
from edgellm_exporters.graph.capture import signature_of
from edgellm_exporters.graph.capture_encoder import Graphs, capture_graphs
from edgellm_exporters.graph.lower import prepare
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.proof.parity import ParityReport, compare
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.proof.torch_backend import encoder_info, torch_session
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime.backends.graph_roles import GraphRoles
from edgellm_runtime.backends.ort_roles import OrtRolesBackend
from edgellm_runtime.bundle.engine_info import ENCODE
from edgellm_runtime.session import Session
from edgellm_runtime.spec import Signature

PRECISIONS = ("float16", "bfloat16", "int8", "w8a8", "int4", "fp8")  # the quantized ones with float16 activations
CAPABILITY = "8.9"  # the least that has 8-bit floats


@dataclass(frozen=True)
class Row:
    """What was found.

    Args:
        report: the graphs on ONNX Runtime CPU against PyTorch with the same weights.
        cosine: of all their logits, the least of any position.
        layers: role to the number of layers of each kind in the network that the parser made.
        engines: role to bytes.
    """

    report: ParityReport
    cosine: float
    layers: dict[str, dict[str, int]]
    engines: dict[str, int]


def sizes_for(model: Any) -> Sizes:
    return sizes_of(EngineOptions(chunk=16), min(CONTEXT, model.config.max_context))


def model_of(family: str) -> nn.Module:
    return SOURCE_FAMILIES[family]() if family in SOURCE_FAMILIES else make(family)


def planned_graphs(model: Any, method: str) -> tuple[Graphs, Plan]:
    """What an export of this model without text makes before lowering."""
    if not answers_sources(model):
        graph, plan = planned(model, "tensorrt", method)
        return Graphs(graph), plan
    target, info = find_target("tensorrt"), encoder_info(model)
    assert info is not None
    captured = capture_graphs(model)
    for each in captured.all:
        prepare(each, target)
    rows, _ = golden_rows(None, model.config.vocab_size, model.config.max_context).answering(info.start, 24)
    scheme = find_method(method, target.methods)
    return captured, make_plan(scheme, captured.step, model, rows, encoder=captured.encoder)


def graphs(family: str, precision: str, directory: Path) -> tuple[nn.Module, Any, Session]:
    """The family's graphs in a directory, the model that they must equal, and their session.

    Those in bfloat16, which ONNX Runtime's CPU kernels lack, are followed by their stand-in in float32, which is run.
    """
    method, dtype = ("none", precision) if "float" in precision else (precision, "float16")
    model, target = model_of(family), find_target("tensorrt")
    captured, plan = planned_graphs(model, method)
    forms = sizes_for(model).forms
    write_roles(captured, target, plan, forms(dtype), directory, lambda what, share: None)
    reference = model if method == "none" else quantized_model(model, plan, integer_products=False)
    run = directory
    if dtype == "bfloat16":
        run, reference = directory / "stand-in", _rounded(model)
        run.mkdir()
        write_roles(captured, target, plan, forms("float32", dtype), run, lambda what, share: None)
        dtype = "float32"
    return reference, plan, session_of(model, run, dtype)


def _rounded(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            tensor.copy_(tensor.bfloat16().float())
        for ours, theirs in zip(copied.modules(), model.modules(), strict=True):
            if isinstance(ours, Norm) and isinstance(theirs, Norm):  # a graph holds 1 + w, and rounds that
                ours.weight.copy_((1 + theirs.weight).bfloat16().float() - 1)
            if isinstance(ours, Gemma2):
                ours.embedding_scale = float(torch.tensor(ours.embedding_scale).bfloat16())
    return copied


def session_of(model: Any, directory: Path, dtype: str) -> Session:
    signature, sizes, info = signature_in(model, dtype), sizes_for(model), encoder_info(model)
    roles, encoder = GraphRoles(sizes.graphs), None if info is None else directory / info.file
    return Session(
        OrtRolesBackend(directory, roles, signature, threads=1, encoder=encoder), signature,
        max_context=sizes.max_context, ragged_chunks=True, chunk=roles.longest, capacity=sizes.capacity, encoder=info,
    )  # fmt: skip


def signature_in(model: Any, dtype: str) -> Signature:
    """A model's signature whose state is of graphs that compute in a dtype."""
    whole = signature_of(model)
    state = [dataclasses.replace(s, dtype=dtype) if s.dtype == "float32" else s for s in whole.state]
    return Signature(whole.inputs, whole.outputs, tuple(state))


@torch.no_grad()
def cosine(model: Any, session: Session, row: list[int], source: list[int] | None = None) -> float:
    sources = None if source is None else [source]
    ours, theirs = (
        each.step(np.array([row]), each.new_state(1, len(row), sources=sources), logits="all")[0].astype(np.float64)
        for each in (session, torch_session(model))
    )
    return float(((ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)).min())


def row(family: str, precision: str, directory: Path) -> Row:
    reference, _, session = graphs(family, precision, directory)
    model, rng = model_of(family), np.random.default_rng(1)
    info, length = encoder_info(model), min(50, model.config.max_context - 2)
    windows = rng.integers(0, VOCAB, (4, length)).tolist()
    sources = None if info is None else [window[: 24 - 6 * i] for i, window in enumerate(reversed(windows))]
    report = compare(reference, session, windows, sources=sources)
    alike = cosine(reference, session, windows[0], sources[0] if sources else None)
    signature = signature_in(model, precision if "float" in precision else "float16")
    layers, engines, times = {}, {}, {role: (i.file, i.time) for role, i in sizes_for(model).graphs.items()}
    if info is not None:
        times[ENCODE] = info.file, 1
    for role, (file, time) in times.items():
        facts, engine = Facts.in_role(signature, role), directory / f"{role}.engine"
        build_engine(
            find_library(), directory / file, engine, facts=facts, time=time, options=EngineOptions(max_batch=4),
            capabilities=[CAPABILITY], max_source=info.max_source if info else 1,
        )  # fmt: skip
        layers[role], engines[role] = facts.seen, engine.stat().st_size
    return Row(report, alike, layers, engines)
