"""Codes of 3 bits in as many bits: bytes of two 4-bit codes, none above 7, have two bits to spare.

A quarter of a matrix's bytes goes into the spare bits of the other three. Kernels read the bytes with 4-bit codes; a
graph makes them of what is stored with a few operators on whole parts, which need no number of a row
(:mod:`edgellm_exporters.lowering.three_bits`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODES", "PARTS", "PLACES", "SHIFTS", "condensed", "spread"]

Bytes = NDArray[np.uint8]
PARTS = 3  # that keep their places
CODES = np.uint8(0x77)  # a byte's bits that hold its own two codes
SHIFTS = np.array([[3], [2], [1]], dtype=np.uint8)  # from each part's spare bits to those bits' places in the fourth
PLACES = np.array([[0x11], [0x22], [0x44]], dtype=np.uint8)


def condensed(packed: Bytes) -> Bytes:
    """Bytes of two codes below 8 each, a multiple of four of them, as (3, size / 4) bytes."""
    parts = packed.reshape(PARTS + 1, -1)
    return parts[:PARTS] | ((parts[PARTS:] & PLACES) << SHIFTS)


def spread(stored: Bytes) -> Bytes:
    """The bytes (4 * size,) that :func:`condensed` made (3, size) of."""
    spare = (stored >> SHIFTS) & PLACES
    return np.concatenate([stored & CODES, spare[:1] | spare[1:2] | spare[2:]]).reshape(-1)
