"""What a bundle's layers are held to, measured on the finished bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgellm_exporters.proof.opened import open_tapped
from edgellm_exporters.proof.traces import Trace
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.layers import LAYER, layer_difference, sampled_layer
from edgellm_runtime.checks.verify import MARGIN
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model

__all__ = ["LayerDistance", "furthest", "layer_bounds", "layer_distances", "layers_in", "typical_distance"]

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


class LayerDistance(NamedTuple):
    """How far a layer's outputs are from a row's, relative in norm."""

    samples: float  # at the places that goldens have, as :func:`layer_difference` has it
    token: float  # the largest of one token's


def layer_distances(
    reference: Trace, outputs: Mapping[str, NDArray[np.float32] | Tensor]
) -> dict[str, LayerDistance]:  # fmt: skip
    """How far the outputs of layers (time, features) are from a trace's, by path; for paths that both have."""
    found = {}
    for path in (path for path in reference.layers if path in outputs):
        expected, given = reference.layers[path].float().numpy(), np.asarray(outputs[path], dtype=np.float32)
        sampled = layer_difference(sampled_layer(expected), given)
        found[path] = LayerDistance(sampled, float(_differences(expected, given).max()))
    return found


def furthest(*each: Mapping[str, LayerDistance]) -> dict[str, LayerDistance]:
    """The largest distances of each layer; a NaN is larger than all."""
    paths = dict.fromkeys(path for distances in each for path in distances)
    met = {path: [distances[path] for distances in each if path in distances] for path in paths}
    return {
        path: LayerDistance(*(float(np.max(kind)) for kind in zip(*found, strict=True))) for path, found in met.items()
    }


def layer_bounds(
    bundle: Bundle, paths: Sequence[str], reference: Trace, others: Mapping[str, LayerDistance], model: Trace
) -> dict[str, Mapping[str, float]]:
    """Bounds for the distances of layers from their goldens, and how far they are from the float model.

    Args:
        bundle: finished but for these bounds.
        paths: of its layers.
        reference: what the goldens are samples of, one row.
        others: how far further traces of the same row are from it, as sums in another order might make them.
        model: the float model's trace of that row.
    """
    row = np.asarray(reference.tokens, dtype=np.int64)
    each = [_outputs(bundle, paths, row, count) for count in (1, 2)]
    worst = furthest(others, *(layer_distances(reference, outputs) for outputs in each))
    floor = _FLOORS[bundle.manifest.dtype]
    return {
        path: {
            "bound": max(MARGIN * worst[path].samples, floor), "rounding": max(MARGIN * worst[path].token, floor),
            "distance": typical_distance(model.layers[path].float().numpy(), each[0][path]),
        }
        for path in paths
    }  # fmt: skip


def _outputs(
    bundle: Bundle, paths: Sequence[str], row: NDArray[np.int64], threads: int
) -> dict[str, NDArray[np.float32]]:
    """Of a session on so many threads, which is gone before another is made."""
    give_back()
    return open_tapped(bundle, paths, threads).read(row)[1]


def typical_distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The median over tokens of the relative difference of a layer's outputs (time, features)."""
    return float(np.median(_differences(expected, found)))


def _differences(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each token's output, relative in norm."""
    size = np.linalg.norm(expected, axis=-1) + np.float32(1e-12)
    away: NDArray[np.float32] = np.linalg.norm(found - expected, axis=-1) / size
    return away
