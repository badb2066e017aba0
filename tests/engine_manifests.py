"""What manifests say of engines, made up: no library and no file is behind them."""

from __future__ import annotations

from typing import Any

from edgellm_runtime.bundle import FileInfo, Manifest
from edgellm_runtime.bundle.engine_info import EngineInfo, GraphInfo, Range
from edgellm_runtime.spec import Signature, StateSpec, TensorSpec

GRAPHS = {"prefill": GraphInfo("prefill.onnx", 16), "decode": GraphInfo("decode.onnx", 1)}
FILES = {
    name: FileInfo(10, f"{name}'s sha256")
    for name in ("prefill.onnx", "decode.onnx", "model.onnx.data", "prefill.engine", "decode.engine")
}


def engine(role: str, **changes: Any) -> EngineInfo:
    found: dict[str, Any] = {
        "role": role, "file": f"{role}.engine", "library": "tensorrt_rtx", "library_version": "1.7.1",
        "compute_capabilities": ("8.6", "8.9"), "precision": "float16",
        "profile": {"tokens": Range((1, 1), (1, 1), (4, 1))}, "graph_sha256": f"{role}.onnx's sha256",
    }  # fmt: skip
    return EngineInfo(**found | changes)


def manifest(*engines: EngineInfo, **changes: Any) -> Manifest:
    state = StateSpec("layers.0.k", ("batch", 2, "capacity", 8), "float16", "append")
    signature = Signature(
        (TensorSpec("tokens", ("batch", "time"), "int64"),), (TensorSpec("logits", ("batch", "count", 7), "float32"),),
        (state,),
    )  # fmt: skip
    found: dict[str, Any] = {
        "name": "m", "target": {"name": "tensorrt", "requires": {}}, "signature": signature, "max_context": 40,
        "ragged_chunks": True, "dtype": "float16", "files": FILES, "graphs": GRAPHS, "capacity": 64,
        "engines": engines,
    }  # fmt: skip
    return Manifest(**found | changes)
