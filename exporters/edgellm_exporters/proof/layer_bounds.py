"""What a bundle's layers are held to, measured on the finished bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.proof.traces import Trace
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.layers import LAYER, layer_difference, sampled_layer, tapped
from edgellm_runtime.checks.verify import MARGIN
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model

__all__ = ["layer_bounds", "layers_in", "typical_distance"]

_FLOORS = {"float32": 1e-4, "float16": 0.01}  # what sums in another order cost


def layers_in(directory: Path, graphs: Sequence[str], trace: Trace) -> list[str]:
    """The layers of a trace whose outputs every graph names, in the first one's order.

    Args:
        directory: of the bundle.
        graphs: names of their files.
        trace: of one row.
    """
    named = [_named(directory / name) for name in graphs]
    return [path for path in named[0] if path in trace.layers and all(path in paths for paths in named)]


def _named(file: Path) -> list[str]:
    if not file.is_file():
        return []
    made = [bytes(name).decode() for node in nodes_of(read_model(file.read_bytes())) for name in node.get("output", [])]
    return [name.removeprefix(LAYER) for name in made if name.startswith(LAYER)]


def layer_bounds(
    bundle: Bundle, paths: Sequence[str], reference: Trace, copies: Sequence[Trace], model: Trace
) -> dict[str, Mapping[str, float]]:
    """Bounds for the distances of layers from their goldens, and how far they are from the float model.

    Args:
        bundle: finished but for these bounds.
        paths: of its layers.
        reference: what the goldens are samples of, one row.
        copies: further traces of the same row, as sums in another order might make them.
        model: the float model's trace of that row.
    """
    row = np.asarray(reference.tokens, dtype=np.int64)
    each = [tapped(bundle, paths, threads=count).read(row)[1] for count in (1, 2)]
    alike = [*each, *({path: copy.layers[path].numpy() for path in paths} for copy in copies)]
    found: dict[str, Mapping[str, float]] = {}
    for path in paths:
        golden = sampled_layer(reference.layers[path].float().numpy())
        expected = reference.layers[path].float().numpy()
        worst = max(layer_difference(golden, outputs[path]) for outputs in alike)
        furthest = max(float(_differences(expected, outputs[path]).max()) for outputs in alike)
        distance = typical_distance(model.layers[path].float().numpy(), each[0][path])
        floor = _FLOORS[bundle.manifest.dtype]
        found[path] = {
            "bound": max(MARGIN * worst, floor), "rounding": max(MARGIN * furthest, floor), "distance": distance,
        }  # fmt: skip
    return found


def typical_distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The median over tokens of the relative difference of a layer's outputs (time, features)."""
    return float(np.median(_differences(expected, found)))


def _differences(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each token's output, relative in norm."""
    size = np.linalg.norm(expected, axis=-1) + np.float32(1e-12)
    away: NDArray[np.float32] = np.linalg.norm(found - expected, axis=-1) / size
    return away
