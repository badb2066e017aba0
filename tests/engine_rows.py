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
from torch import nn

from edgellm.models.gemma2 import Gemma2, Norm
from edgellm_exporters.engines.fixed_sizes import sizes_of, write_roles
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.parser_check import Facts
from edgellm_exporters.engines.tensorrt import build_engine, find_library
from edgellm_exporters.graph.capture import signature_of
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.proof.parity import ParityReport, compare
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime.backends.graph_roles import GraphRoles
from edgellm_runtime.backends.ort_roles import OrtRolesBackend
from edgellm_runtime.session import Session
from edgellm_runtime.spec import Signature

PRECISIONS = ("float16", "bfloat16", "int8", "w8a8", "int4", "fp8")  # the quantized ones with float16 activations
CAPABILITY = "8.9"  # the least that has 8-bit floats
SIZES = sizes_of(EngineOptions(chunk=16), CONTEXT)


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


def graphs(family: str, precision: str, directory: Path) -> tuple[nn.Module, Any, Session]:
    """The family's graphs in a directory, the model that they must equal, and their session.

    Those in bfloat16, which ONNX Runtime's CPU kernels lack, are followed by their stand-in in float32, which is run.
    """
    method, dtype = ("none", precision) if "float" in precision else (precision, "float16")
    model, target = make(family), find_target("tensorrt")
    graph, plan = planned(model, "tensorrt", method)
    write_roles(graph, target, plan, SIZES.forms(dtype), directory, lambda what, share: None)
    reference = model if method == "none" else quantized_model(model, plan, integer_products=False)
    run = directory
    if dtype == "bfloat16":
        run, reference = directory / "stand-in", _rounded(model)
        run.mkdir()
        write_roles(graph, target, plan, SIZES.forms("float32", dtype), run, lambda what, share: None)
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
    signature = signature_of(model)
    state = tuple(dataclasses.replace(s, dtype=dtype) for s in signature.state)
    signature, roles = Signature(signature.inputs, signature.outputs, state), GraphRoles(SIZES.graphs)
    return Session(
        OrtRolesBackend(directory, roles, signature, threads=1), signature, max_context=CONTEXT, ragged_chunks=True,
        chunk=roles.longest, capacity=SIZES.capacity,
    )  # fmt: skip


@torch.no_grad()
def cosine(model: Any, session: Session, row: list[int]) -> float:
    ours = session.step(np.array([row]), session.new_state(1, len(row)), logits="all")[0].astype(np.float64)
    theirs = model(torch.tensor([row]))[0][0].double().numpy()
    return float(((ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)).min())


def row(family: str, precision: str, directory: Path) -> Row:
    model, _, session = graphs(family, precision, directory)
    windows = np.random.default_rng(1).integers(0, VOCAB, (4, 50)).tolist()
    report, tokens = compare(model, session, windows), windows[0]
    signature, layers, engines = signature_of(make(family)), {}, {}
    dtype = precision if "float" in precision else "float16"
    for role, info in SIZES.graphs.items():
        state = {s.name: dtype for s in signature.state}
        facts = Facts(
            {"logits": "float32"} | {f"present.{n}": d for n, d in state.items()},
            {f"past.{n}": d for n, d in state.items()}, sum(s.update == "append" for s in signature.state),
        )  # fmt: skip
        engine = directory / f"{role}.engine"
        build_engine(
            find_library(), directory / info.file, engine, facts=facts, time=info.time,
            options=EngineOptions(max_batch=4), capabilities=[CAPABILITY],
        )  # fmt: skip
        layers[role], engines[role] = facts.seen, engine.stat().st_size
    return Row(report, cosine(model, session, tokens), layers, engines)
