"""The outputs of a bundle's layers, fetched from its graph: which is the first that is not what it should be?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.session import Session

if TYPE_CHECKING:
    from edgellm_runtime.backends.own_kernels import OwnKernels

__all__ = [
    "LAYER", "LAYERS", "LayerGolden", "TappedSession", "layer_difference", "layer_goldens", "sampled_layer", "tapped",
]  # fmt: skip

LAYERS = "layers"  # samples of them in the goldens
LAYER = "layer/"  # how the names of layers' outputs begin in a graph; the path in the model follows
_SAMPLES = 16
_PIECE = 128  # tokens of a step
Array = NDArray[Any]


@dataclass(frozen=True)
class LayerGolden:
    """Samples of what one layer gives for one row: the norm at each token, and some of its numbers."""

    norms: Array  # (time,)
    index: Array  # into the flattened output
    values: Array


class TappedSession:
    """Steps of a bundle that give the outputs of its layers, too.

    Args:
        session: of the bundle.
        fetched: gives what the last step fetched, by name.
        paths: of the layers.
    """

    def __init__(self, session: Session, fetched: Any, paths: Sequence[str]) -> None:
        self.session, self._fetched, self.paths = session, fetched, tuple(paths)

    def read(self, row: Array) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """Read a row of tokens from an empty state.

        Args:
            row: (time,) token ids.

        Returns:
            Logits (time, width), the outputs of the layers (time, features), and the state after the row by name,
            slots in use; all copies, in float32.
        """
        state = self.session.new_state(1, len(row))
        logits, found = list[Array](), {path: list[Array]() for path in self.paths}
        piece = len(row) if self.session.one_pass else min(_PIECE, self.session.chunk)
        for start in range(0, len(row), piece):
            logits.append(self.session.step(row[None, start : start + piece], state, logits="all")[0].copy())
            for path, value in self._fetched().items():
                found[path].append(value[0].astype(np.float32))
        carried = {s.name: np.array(state.read(s.name)[s.used(len(row))][0], np.float32) for s in state.specs}
        return np.concatenate(logits), {path: np.concatenate(parts) for path, parts in found.items()}, carried


def tapped(
    bundle: Bundle, paths: Sequence[str] | None = None, *, threads: int | None = None,
    kernels: OwnKernels | None = None,
) -> TappedSession:  # fmt: skip
    """A session on this CPU whose steps give the outputs of layers.

    Args:
        bundle: of graphs that run here; engines are read by the graphs that they were built from.
        paths: of layers; None for all that the manifest names.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        kernels: for the products that they can do; None for ONNX Runtime's.

    Raises:
        BackendError: the library refuses a graph, such as one in bfloat16.
    """
    from edgellm_runtime.backends.graph_roles import GraphRoles
    from edgellm_runtime.backends.ort import OrtBackend
    from edgellm_runtime.backends.ort_roles import OrtRolesBackend
    from edgellm_runtime.loading import session_of

    manifest = bundle.manifest
    paths = tuple(manifest.layers) if paths is None else tuple(paths)
    fetch = [f"{LAYER}{path}" for path in paths]
    backend: OrtBackend | OrtRolesBackend
    if manifest.graphs:
        roles = GraphRoles.of(manifest)
        folder = bundle.file(roles.all[0].file).parent
        backend = OrtRolesBackend(folder, roles, manifest.signature, threads=threads, fetch=fetch)
    else:
        backend = OrtBackend(
            bundle.file(GRAPH), manifest.signature, threads=threads, fusions=manifest.dtype == "float32", fetch=fetch,
            kernels=kernels,
        )  # fmt: skip
    return TappedSession(
        session_of(bundle, backend), lambda: {n.removeprefix(LAYER): v for n, v in backend.fetched.items()}, paths
    )


def sampled_layer(output: Array) -> LayerGolden:
    """Samples of a layer's output (time, features), always from the same places."""
    flat = output.reshape(-1).astype(np.float64)
    index = np.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat))).astype(np.int64)
    return LayerGolden(np.linalg.norm(output.astype(np.float64), axis=-1), index, flat[index])


def layer_goldens(data: Mapping[str, Any]) -> dict[str, LayerGolden]:
    """The samples of one row's layers as a goldens file has them.

    Raises:
        ValueError: they are none.
    """
    found = {}
    for path, entry in data.items():
        arrays = [np.asarray(entry[key], np.float64) for key in ("norms", "index", "values")]
        if any(a.ndim != 1 or not np.isfinite(a).all() for a in arrays) or len(arrays[1]) != len(arrays[2]):
            raise ValueError(f"samples of layer {path!r} that are none")
        found[str(path)] = LayerGolden(arrays[0], arrays[1].astype(np.int64), arrays[2])
    return found


def layer_difference(golden: LayerGolden, output: Array) -> float:
    """How far a layer's output is from its samples: of norms the largest, of numbers the relative difference; NaN where
    they do not fit.
    """
    flat = output.reshape(-1).astype(np.float64)
    if len(golden.norms) != len(output) or not len(golden.index) or not 0 <= golden.index.min() <= golden.index.max():
        return math.nan
    if golden.index.max() >= len(flat):
        return math.nan
    norms = np.abs(np.linalg.norm(output.astype(np.float64), axis=-1) - golden.norms) / (golden.norms + 1e-12)
    numbers = np.linalg.norm(flat[golden.index] - golden.values) / (np.linalg.norm(golden.values) + 1e-12)
    return float(np.maximum(norms.max(), numbers))
