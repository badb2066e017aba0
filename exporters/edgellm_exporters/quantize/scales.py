"""Scales as a file holds them: float16, or whole numbers of 8 bits times a power of two that a row has.

Either is exactly a float16, so what reads scales need not know which of the two is meant.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.grids import half_precision
from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime.graphs.narrow_scales import LEAST_POWER, MOST_POWER

__all__ = ["in_bytes", "stored_scales", "units_of"]

Array = NDArray[np.float32]
_MOST = 255


def stored_scales(scales: Array, scheme: Scheme, units: Array | None = None) -> Array:
    """Each scale as the file will hold it; none is zero, and signs stay.

    Args:
        scales: (rows, blocks), of whole rows.
        scheme: says in how many bits.
        units: (rows, 1), of which scales of 8 bits are to be multiples; None for the smallest that the largest scale of
            the row allows.

    Returns:
        (rows, blocks). In 8 bits, half a unit away at most, but for what is above 255 units of the row or below half a
        one.
    """
    sizes = np.abs(scales)
    if scheme.scale_bits == 8:
        units = units_of(sizes) if units is None else units
        sizes = np.clip(np.rint(sizes / units), 1, _MOST) * units
    else:
        sizes = half_precision(sizes)
    found: Array = np.copysign(sizes, scales).astype(np.float32, copy=False)
    return found


def units_of(scales: Array) -> Array:
    """The smallest power of two for each row, (rows, 1), with which none of its scales (rows, blocks) is above 255."""
    parts, powers = np.frexp(scales.max(-1, keepdims=True) / _MOST)
    powers = np.clip(powers - (parts == 0.5), LEAST_POWER, MOST_POWER)
    found: Array = np.ldexp(np.float32(1), powers).astype(np.float32, copy=False)
    return found


def in_bytes(scales: Array) -> NDArray[np.uint8]:
    """Scales of 8 bits, none of them negative, as bytes.

    Args:
        scales: (rows, blocks), from :func:`stored_scales`.

    Returns:
        (rows, 1 + blocks): the power of a row's unit, counted from the least, and how many units a scale has.
    """
    units = units_of(scales)
    powers = np.frexp(units)[1] - 1 - LEAST_POWER
    return np.concatenate([powers, scales / units], axis=1).astype(np.uint8)
