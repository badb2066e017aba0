"""Bundles whose engines are descriptions of the fakes', and a machine that runs them."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from marian_files import bergamot
from source_models import t5_model
from tensorrt_fakes import SIDECAR, FakeCuda, FakeTensorRT
from tiny_bundles import (
    attention_model,
    edit_manifest,
    memory_model,
    recurrent_model,
    sign,
    text_assets,
    window_model,
)

from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.parser_check import Facts
from edgellm_exporters.engines.tensorrt import chosen_counts, profile_of
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import open_session
from edgellm_runtime.backends import tensorrt, tensorrt_library
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.bundle.engine_info import ENCODE
from edgellm_runtime.graphs.token_choice import choosing_graph
from edgellm_runtime.session import Session
from edgellm_runtime.state import State

MODELS = {
    "attention": (attention_model, text_assets), "recurrent": (recurrent_model, lambda: None),
    "window": (window_model, text_assets), "memory": (memory_model, lambda: None),
    "answers": (t5_model, lambda: None), "shortlist": (functools.partial(bergamot, listed=3), lambda: None),
}  # fmt: skip
NO_FAVOURITE = ("answers", "shortlist")  # small random weights: the most likely token is hardly more likely than others
MAX_BATCH = 3
SOURCES = [[5, 9, 8, 7, 6, 11, 12], [40, 8], [3, 30, 31, 32]]  # of models that answer some


@functools.cache
def made(name: str) -> Path:
    """A bundle with engines that are descriptions of the fakes'."""
    model, text = MODELS[name]
    folder = Path(tempfile.mkdtemp()) / "bundle"
    options = ExportOptions(
        target="tensorrt", dtype="float16", engine=EngineOptions(build=False, max_batch=MAX_BATCH),
        bounds={"top1": 0.0} if name in NO_FAVOURITE else {},
    )  # fmt: skip
    bundle = export(model(), folder, options=options, text=text()).bundle
    engines, encoder = [], bundle.manifest.encoder
    graphs = {role: (graph.file, graph.time) for role, graph in bundle.manifest.graphs.items()}
    if encoder is not None:
        graphs[ENCODE] = encoder.file, 1
    for role, (file, time) in graphs.items():
        tensors = SIDECAR["networks"][name][role]
        inputs = {n: t["shape"] for n, t in tensors.items() if t["mode"] == "INPUT"}
        sources = Facts.of(bundle.manifest, role).sources
        ranges = profile_of(
            inputs, MAX_BATCH, time, sources=sources, max_source=encoder.max_source if encoder else 1
        )  # fmt: skip
        profile = {n: r.to_json() for n, r in ranges.items()}
        description = {"network": name, "role": role, "graph": str(folder / file), "profile": profile}
        (folder / f"{role}.engine").write_text(json.dumps(description))
        engines.append({
            "role": role, "file": f"{role}.engine", "library": "tensorrt_rtx", "library_version": "1.7.1.116",
            "compute_capabilities": ["8.6"], "precision": "float16", "profile": profile,
            "graph_sha256": bundle.manifest.files[file].sha256,
        })  # fmt: skip
    width = bundle.manifest.width
    choosers = []
    for count in chosen_counts(bundle.manifest):
        graph = choosing_graph("float32", width, count, sized=True)
        (folder.parent / f"choose-{count}.onnx").write_bytes(graph)
        profile = {n: r.to_json() for n, r in profile_of({"logits": (-1, 1, width)}, MAX_BATCH, 1).items()}
        where = str(folder.parent / f"choose-{count}.onnx")
        description = {"network": name, "role": f"choose-{count}", "graph": where, "profile": profile}
        (folder / f"choose-{count}.engine").write_text(json.dumps(description))
        choosers.append({
            **engines[0], "role": "choose", "file": f"choose-{count}.engine", "count": count, "precision": "float32",
            "profile": profile, "graph_sha256": hashlib.sha256(graph).hexdigest(),
        })  # fmt: skip
    edit_manifest(folder, engines=engines, choosers=choosers)
    sign(folder, *(entry["file"] for entry in (*engines, *choosers)))
    return folder


def machine_with_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with one GPU of compute capability 8.6 and TensorRT for RTX."""
    cuda = FakeCuda()
    machine = types.SimpleNamespace(cuda=cuda, library=FakeTensorRT(cuda))
    monkeypatch.setattr(tensorrt, "bindings", lambda: machine.cuda)

    def imported(name: str) -> Any:
        if name == "tensorrt_rtx":
            return machine.library
        raise ImportError(name)

    monkeypatch.setattr(tensorrt_library, "imported", imported)
    return machine


def both(name: str) -> tuple[Session, Session]:
    bundle = Bundle(made(name))
    return open_session(bundle, device="cpu", threads=1), open_session(bundle, device="tensorrt")


def begun(session: Session, rows: int, capacity: int) -> State:
    """A state of rows that hold no token; where the model answers sources, of unequal ones."""
    return session.new_state(rows, capacity, sources=SOURCES[:rows] if session.encoder else None)
