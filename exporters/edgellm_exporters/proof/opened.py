"""Sessions that an export proves a bundle with, on ONNX Runtime's kernels: of large graphs a section at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgellm_exporters.graph.write import WEIGHTS_FILE
from edgellm_exporters.proof.section_backend import SectionBackend
from edgellm_runtime.backends import Backend
from edgellm_runtime.backends.kernel_test import check_kernels
from edgellm_runtime.backends.ort import OrtBackend
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.far import float_session
from edgellm_runtime.checks.layers import LAYER, TappedSession, tapped
from edgellm_runtime.loading import session_of, unchecked_session
from edgellm_runtime.session import Session
from edgellm_runtime.spec import Signature

__all__ = ["open_floats", "open_proof", "open_tapped", "step_backend"]

_WHOLE_BYTES = 576 << 20  # of weights in memory at once, as kernels have put them in order; more are run in sections
_SECTION_BYTES = 64 << 20


def open_proof(bundle: Bundle, threads: int | None = None) -> Session:
    """Steps of a bundle of one's own making.

    Args:
        bundle: its graph and manifest written.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
    """
    if not _is_large(bundle):
        return unchecked_session(bundle, device="cpu", threads=threads, kernels="onnxruntime")
    if bundle.manifest.quantization.get("method", "none") != "none":
        check_kernels(bundle.file(GRAPH), bundle.manifest.files[GRAPH].sha256)
    return session_of(bundle, _sections(bundle, threads))


def open_floats(bundle: Bundle, threads: int | None = None) -> Session:
    """The same whose products read floats, see :func:`edgellm_runtime.checks.far.float_session`."""
    if not _is_large(bundle):
        return float_session(bundle, threads)
    return session_of(bundle, _sections(bundle, threads, float_inputs=True))


def open_tapped(bundle: Bundle, paths: Sequence[str], threads: int | None = None) -> TappedSession:
    """The same whose steps give the outputs of layers, see :func:`edgellm_runtime.checks.layers.tapped`."""
    if not _is_large(bundle):
        return tapped(bundle, paths, threads=threads)
    backend = _sections(bundle, threads, fetch=[f"{LAYER}{path}" for path in paths])
    return TappedSession(
        session_of(bundle, backend), lambda: {n.removeprefix(LAYER): v for n, v in backend.fetched.items()}, paths
    )


def step_backend(graph: Path, signature: Signature) -> Backend:
    """What runs a graph in float32 that has no manifest yet.

    Args:
        graph: its file, weights beside it.
        signature: of the graph.
    """
    if _weight_bytes(graph) > _WHOLE_BYTES:
        return SectionBackend(graph, signature, _SECTION_BYTES)
    return OrtBackend(graph, signature)


def _is_large(bundle: Bundle) -> bool:
    """Whether a bundle is one graph for every use that takes too much memory whole."""
    manifest = bundle.manifest
    return not manifest.graphs and manifest.encoder is None and _weight_bytes(bundle.file(GRAPH)) > _WHOLE_BYTES


def _weight_bytes(graph: Path) -> int:
    file = graph.with_name(WEIGHTS_FILE)
    return file.stat().st_size if file.is_file() else 0


def _sections(
    bundle: Bundle, threads: int | None, *, fetch: Sequence[str] = (), float_inputs: bool = False
) -> SectionBackend:
    manifest = bundle.manifest
    return SectionBackend(
        bundle.file(GRAPH), manifest.signature, _SECTION_BYTES, threads=threads, fusions=manifest.dtype == "float32",
        fetch=fetch, float_inputs=float_inputs,
    )  # fmt: skip
