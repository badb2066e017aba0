"""Codes of 3 bits in as many bits: bytes of two 4-bit codes, none above 7, have two bits to spare.

A quarter of a matrix's bytes goes into the spare bits of the other three. Kernels read the bytes with 4-bit codes; a
graph makes them of what is stored with a few bitwise operators on whole parts, which need no number of a row. All of
that depends on constants alone, so that libraries compute it when they load a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.graphs.graph_view import Constant, GraphView

__all__ = ["CODES", "PARTS", "PLACES", "SHIFTS", "StoredCodes", "condensed", "spread", "stored_codes", "whole_codes"]

Bytes = NDArray[np.uint8]
PARTS = 3  # that keep their places
CODES = 0x77  # a byte's bits that hold its own two codes
SHIFTS = (3, 2, 1)  # from each part's spare bits to those bits' places in the fourth
PLACES = (0x11, 0x22, 0x44)


def condensed(packed: Bytes) -> Bytes:
    """Bytes of two codes below 8 each, a multiple of four of them, as (3, size / 4) bytes."""
    parts = packed.reshape(PARTS + 1, -1)
    return parts[:PARTS] | ((parts[PARTS:] & _each(PLACES)) << _each(SHIFTS))


def spread(stored: Bytes) -> Bytes:
    """The bytes (4 * size,) that :func:`condensed` made (3, size) of."""
    whole = np.empty((PARTS + 1, stored.shape[1]), np.uint8)
    np.bitwise_and(stored, np.uint8(CODES), out=whole[:PARTS])
    spare = stored >> _each(SHIFTS)
    spare &= _each(PLACES)
    np.bitwise_or.reduce(spare, axis=0, out=whole[PARTS])
    return whole.reshape(-1)


def _each(numbers: tuple[int, ...]) -> Bytes:
    """One for each part, (3, 1)."""
    return np.array(numbers, np.uint8)[:, None]


@dataclass(frozen=True)
class StoredCodes:
    """Codes of 3 bits, as a file has them.

    Args:
        name: of the initializer, (3, an eighth of the codes) bytes.
        codes: how many there are.
        dims: of the value that has them, in bytes of two.
        chain: places of the nodes that make bytes of two codes each.
    """

    name: str
    codes: int
    dims: tuple[int, ...]
    chain: frozenset[int]


def stored_codes(view: GraphView, name: str) -> StoredCodes | None:
    """What a value with bytes of two codes each is made of, if it is what an export makes of 3 bits."""
    reshape = view.made_by(name, "Reshape")
    concat = None if reshape is None else view.made_by(view.node(reshape).inputs[0], "Concat")
    if reshape is None or concat is None or view.node(concat).numbers.get("axis") != 0:
        return None
    dims = view.sizes(view.node(reshape).inputs[1])
    if len(view.node(concat).inputs) != 2 or dims is None:
        return None
    first, last = view.node(concat).inputs
    own, fourth = view.made_by(first, "BitwiseAnd"), _fourth(view, last)
    if own is None or fourth is None:
        return None
    source, chain = fourth
    stored = view.constants.get(source)
    if list(view.node(own).inputs[:1]) != [source] or not _is(view, view.node(own).inputs[1], (CODES,), ()):
        return None
    if stored is None or not _fits(stored):
        return None
    codes = stored.size * 8 // PARTS
    return StoredCodes(source, codes, dims, chain | {reshape, concat, own}) if 2 * math.prod(dims) == codes else None


def whole_codes(view: GraphView) -> Iterator[tuple[int, StoredCodes]]:
    """The places of the nodes that give bytes of two codes each, and what these are made of."""
    for place, node in enumerate(view.nodes):
        found = stored_codes(view, node.outputs[0]) if node.op == "Reshape" else None
        if found is not None:
            yield place, found


def _fits(stored: Constant) -> bool:
    return stored.dtype == "uint8" and stored.dims is not None and len(stored.dims) == 2 and stored.dims[0] == PARTS


def _is(view: GraphView, name: str, numbers: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    """Whether a value is an initializer of these bytes."""
    return view.constants.get(name) == Constant("uint8", len(numbers), dims) and view.numbers(name) == numbers


def _fourth(view: GraphView, name: str) -> tuple[str, frozenset[int]] | None:
    """The initializer whose spare bits a value has, and the places of the nodes that find them."""
    last = view.made_by(name, "BitwiseOr")
    first = None if last is None else view.made_by(view.node(last).inputs[0], "BitwiseOr")
    if last is None or first is None:
        return None
    parts = [*view.node(first).inputs, view.node(last).inputs[1]]
    split = view.made_by(parts[0], "Split")
    if split is None or view.node(split).numbers.get("axis") != 0 or list(view.node(split).outputs) != parts:
        return None
    masked = view.made_by(view.node(split).inputs[0], "BitwiseAnd")
    shifted = None if masked is None else view.made_by(view.node(masked).inputs[0], "BitShift")
    if masked is None or shifted is None or view.attributes(shifted).get("direction") != "RIGHT":
        return None
    if len(view.node(split).inputs) != 1 or not _is(view, view.node(masked).inputs[1], PLACES, (PARTS, 1)):
        return None
    source, shifts = view.node(shifted).inputs
    if not _is(view, shifts, SHIFTS, (PARTS, 1)):
        return None
    return source, frozenset([last, first, split, masked, shifted])
