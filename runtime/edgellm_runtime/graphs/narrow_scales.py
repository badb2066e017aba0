"""Scales of 8 bits, as a file has them: how a graph makes floats of them, and which of its values are such.

A row of bytes begins with the power of its unit, counted from the least; after it stand whole numbers of units. A graph
splits the two, looks powers up in a table, and multiplies: all of it depends on constants alone, so that libraries
compute it when they load a graph. edgellm's own operators read the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.graphs.graph_view import Constant, GraphView
from edgellm_runtime.graphs.writer import ELEMENT_TYPES

__all__ = [
    "LEAST_POWER",
    "MOST_POWER",
    "POWERS",
    "narrow_scales",
    "random_scales",
    "scale_bits_of",
    "stored_scales",
    "widened",
]

LEAST_POWER, MOST_POWER = -24, 8  # 255 times these, and all whole numbers below, are float16's
POWERS = tuple(2.0**power for power in range(LEAST_POWER, MOST_POWER + 1))
_TABLE = Constant("float32", len(POWERS), (len(POWERS),))
_SAID = "scale_bits"  # of an own operator's node that reads such bytes


def narrow_scales(view: GraphView) -> Iterator[tuple[str, Constant]]:
    """The names of all values of a graph that are scales of 8 bits, (rows, blocks) of float32, and what they are."""
    for place, node in enumerate(view.nodes):
        found = _bytes_of(view, node.outputs[0]) if node.op == "Mul" and not view.domain(place) else None
        if found is not None:
            rows, columns = found[1]
            yield node.outputs[0], Constant("float32", rows * (columns - 1), (rows, columns - 1))


def stored_scales(view: GraphView, name: str) -> tuple[str, frozenset[int], dict[str, int]]:
    """The initializer that scales are made of, or else they themselves; the nodes that make them of it; and what a node
    that reads it says of it.
    """
    found = _bytes_of(view, name)
    if found is not None:
        return found[0], found[2], {_SAID: 8}
    return *view.uncast(name), {}


def scale_bits_of(attributes: Mapping[str, object], suffix: str = "") -> int:
    """Of the scales that a node of an own operator reads, by its attributes whose names end so."""
    return 8 if attributes.get(f"{_SAID}{suffix}") == 8 else 16


def widened(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The scales (rows, blocks) that bytes (rows, 1 + blocks) stand for."""
    return stored[:, 1:] * np.array(POWERS, np.float32)[stored[:, :1]]


def random_scales(rows: int, blocks: int, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of scales up to 0.03, of several powers, (rows, 1 + blocks)."""
    powers = draw.integers(-15, -12, (rows, 1)) - LEAST_POWER
    return np.concatenate([powers, draw.integers(64, 256, (rows, blocks))], 1).astype(np.uint8)


def _bytes_of(view: GraphView, name: str) -> tuple[str, tuple[int, int], frozenset[int]] | None:
    """The initializer with bytes, its sizes, and the places of the nodes that make scales of it."""
    times = view.made_by(name, "Mul")
    if times is None:
        return None
    whole, unit = view.node(times).inputs
    wide, units = view.made_by(whole, "Cast"), view.made_by(unit, "Gather")
    if wide is None or units is None or view.node(wide).numbers.get("to") != ELEMENT_TYPES["float32"]:
        return None
    table, places = view.node(units).inputs
    index = view.made_by(places, "Cast")
    split = view.made_by(view.node(wide).inputs[0], "Split")
    if index is None or split is None or view.node(units).numbers.get("axis", 0):
        return None
    if view.constants.get(table) != _TABLE or view.numbers(table) != POWERS:
        return None
    source, *sizes = view.node(split).inputs
    given = view.constants.get(source)
    if given is None or given.dtype != "uint8" or given.dims is None or len(given.dims) != 2:
        return None
    rows, columns = given.dims
    apart = len(sizes) == 1 and view.sizes(sizes[0]) == (1, columns - 1) and view.node(split).numbers.get("axis") == 1
    if not apart or view.node(split).outputs != (view.node(index).inputs[0], view.node(wide).inputs[0]):
        return None
    return source, (rows, columns), frozenset([times, wide, units, index, split])
