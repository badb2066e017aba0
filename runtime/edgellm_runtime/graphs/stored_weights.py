"""Quantized weights as a file has them, where a graph makes of them what ONNX Runtime's kernels read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgellm_runtime.graphs.graph_view import Constant, GraphView
from edgellm_runtime.graphs.narrow_scales import narrow_scales, stored_scales
from edgellm_runtime.graphs.three_bits import stored_codes, whole_codes

__all__ = ["StoredWeights", "made_weights", "stored_weights"]


@dataclass(frozen=True)
class StoredWeights:
    """What an own operator reads of codes and their scales.

    Args:
        codes: name of the initializer.
        scales: likewise.
        said: attributes of a node that reads them, where they are not what a node of ONNX Runtime says.
        chain: places of the nodes that make of them what ONNX Runtime's kernels read.
    """

    codes: str
    scales: str
    said: Mapping[str, int]
    chain: frozenset[int]


def stored_weights(view: GraphView, codes: str, scales: str) -> StoredWeights:
    """Codes and scales that a node of a graph reads, as they are stored."""
    three = stored_codes(view, codes)
    stored, chain, said = stored_scales(view, scales)
    if three is None:
        return StoredWeights(codes, stored, said, chain)
    return StoredWeights(three.name, stored, {**said, "bits": 3}, chain | three.chain)


def made_weights(view: GraphView) -> Iterator[tuple[str, Constant]]:
    """The names of all codes and scales that a graph makes of stored ones, and what they are."""
    yield from narrow_scales(view)
    for place, three in whole_codes(view):
        yield view.node(place).outputs[0], Constant("uint8", math.prod(three.dims), three.dims)
