"""How a bundle in 16 bits is proved on this machine, and what its rounding may cost.

ONNX Runtime's CPU kernels know float16 but not bfloat16. A bfloat16 bundle is therefore proved by a stand-in: the very
same graphs in float32, with every weight rounded to bfloat16 first. It is run once and not kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgellm_exporters.atomic import scratch_directory
from edgellm_exporters.errors import LoweringError
from edgellm_runtime.backends import Backend
from edgellm_runtime.backends.graph_roles import GraphRoles
from edgellm_runtime.backends.ort import OrtBackend, library
from edgellm_runtime.backends.ort_roles import OrtRolesBackend
from edgellm_runtime.bundle import GRAPH, Manifest
from edgellm_runtime.checks.verify import AT_LEAST
from edgellm_runtime.session import Session

__all__ = ["bounds_in", "check_types", "proved_on", "stand_in", "stand_in_session"]

_WITHOUT_KERNELS = ("bfloat16",)
# What 16 bits of activations cost, whatever the weights are; of a check that is not named nothing is promised.
_ROUNDOFF: Mapping[str, Mapping[str, float]] = {
    "float16": {"logits": 0.02, "kl": 1e-4, "top1": 0.98, "state": 0.01, "split": 0.02, "batch": 0.02, "hidden": 0.02},
    "bfloat16": {"logits": 0.1, "kl": 5e-3, "top1": 0.9, "state": 0.1, "split": 0.1, "batch": 0.1, "hidden": 0.1},
}


def bounds_in(bounds: Mapping[str, float], dtype: str) -> Mapping[str, float]:
    """A method's bounds for activations of a dtype."""
    if dtype == "float32":
        return bounds
    own = _ROUNDOFF[dtype]
    return {n: (min if n in AT_LEAST else max)(bound, own[n]) for n, bound in bounds.items() if n in own}


@contextmanager
def stand_in(beside: Path, dtype: str) -> Iterator[Path | None]:
    """A directory for graphs that are run once and not kept, beside the bundle; None for a dtype that needs none."""
    if dtype not in _WITHOUT_KERNELS:
        yield None
        return
    with scratch_directory(beside.with_name("stand-in")) as directory:
        yield directory


def proved_on(dtype: str) -> str:
    """What the numbers of a bundle were compared with PyTorch on, for the manifest."""
    if dtype in _WITHOUT_KERNELS:
        return f"ONNX Runtime on CPU, in float32 with weights rounded to {dtype}"
    return f"ONNX Runtime on CPU, in {dtype}"


def check_types(graph: Path) -> None:
    """Have ONNX Runtime look at a graph that it has no kernels for here: names, shapes and types must be sound.

    Raises:
        LoweringError: they are not.
    """
    try:
        library().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise LoweringError(f"the lowered graph is not sound: {str(error).strip()[:300]}") from error


def stand_in_session(directory: Path, manifest: Manifest) -> Session:
    """Steps of a stand-in's graphs, whose state is float32."""
    narrow = manifest.dtype
    state = tuple(
        dataclasses.replace(spec, dtype="float32") if spec.dtype == narrow else spec
        for spec in manifest.signature.state
    )
    wide = dataclasses.replace(manifest.signature, state=state)
    sizes: dict[str, Any] = {}
    backend: Backend
    encoder = None if manifest.encoder is None else directory / manifest.encoder.file
    if manifest.graphs:
        roles = GraphRoles.of(manifest)
        backend = OrtRolesBackend(directory, roles, wide, encoder=encoder)
        sizes = {"chunk": roles.longest, "capacity": manifest.capacity}
    else:
        backend = OrtBackend(directory / GRAPH, wide, encoder=encoder)
    return Session(
        backend, wide, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        vocab_size=manifest.vocab_size, encoder=manifest.encoder, adapters=manifest.adapters, **sizes,
    )  # fmt: skip
