"""Round to nearest, with the scale of each block searched for the least squared error. Needs no calibration."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.grids import PIECE, best_grid, floating_grid, half_precision, in_threads
from edgellm_exporters.quantize.plan import Codes, Scheme, joined
from edgellm_exporters.quantize.scales import stored_scales, units_of

__all__ = ["round_to_nearest"]

Array = NDArray[np.float32]
_TOP_E4M3 = np.float32(448)


def round_to_nearest(weight: Array, scheme: Scheme) -> Codes:
    """Quantize each block of a row on its own.

    Args:
        weight: (rows, columns); columns divide into blocks.
        scheme: the format.
    """
    make = _floating if scheme.floating else _shifted if scheme.shifted else _plain
    step = max(1, PIECE // weight.shape[1])
    pieces = [weight[i : i + step] for i in range(0, len(weight), step)]
    return joined(in_threads(lambda piece: make(piece, scheme), pieces))


def _plain(weight: Array, scheme: Scheme, units: Array | None = None) -> Codes:
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block or columns)
    scales, zeros = best_grid(blocks, scheme)
    scales = stored_scales(scales, scheme, units)
    return Codes(_codes(blocks, scales, zeros, scheme.top).reshape(rows, columns), scales, zeros.astype(np.uint8))


def _codes(blocks: Array, scales: Array, zeros: Array, top: int) -> NDArray[np.uint8]:
    wide = blocks / scales[:, :, None]
    np.add(np.rint(wide, out=wide), zeros[:, :, None], out=wide)
    return np.clip(wide, 0, top, out=wide).astype(np.uint8)


def _floating(weight: Array, scheme: Scheme) -> Codes:
    """8-bit floats, the row's largest weight at their top."""
    scales = half_precision(np.abs(weight).max(-1, keepdims=True) / _TOP_E4M3)
    codes = np.clip(weight / scales, -_TOP_E4M3, _TOP_E4M3).astype(ml_dtypes.float8_e4m3fn)
    return Codes(codes.view(np.uint8), scales, np.zeros(scales.shape, np.uint8), floating=True)


def _shifted(weight: Array, scheme: Scheme) -> Codes:
    """A scale, a whole zero, and a shift for what the zero leaves over; the shifts are a small weight of their own."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block)
    found, lows = floating_grid(blocks, scheme)
    units = _units_of_both(found, lows, scheme) if scheme.scale_bits == 8 else None
    scales = stored_scales(found, scheme, units)
    lows += (found - scales) * np.float32(scheme.top / 2)  # a block's range keeps its middle
    zeros, left = _left_over(lows, scales, scheme)
    shifts = _plain(left, replace(scheme, shifted=False), units)
    kept = shifts.dequantize()[:, : blocks.shape[1], None]
    return Codes(
        np.concatenate([_codes(blocks - kept, scales, zeros, scheme.top).reshape(rows, columns), shifts.codes], axis=1),
        np.concatenate([scales, shifts.scales], axis=1),
        np.concatenate([zeros.astype(np.uint8), shifts.zeros], axis=1),
        columns,
    )


def _left_over(lows: Array, scales: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Whole zeros (rows, blocks), and what they leave of the lowest values, in whole blocks: within half a step of zero
    unless a block is all on one side.
    """
    zeros = np.clip(np.rint(-lows / scales), 0, scheme.top).astype(np.float32)
    return zeros, np.pad(lows + zeros * scales, ((0, 0), (0, -lows.shape[1] % scheme.block)))


def _units_of_both(scales: Array, lows: Array, scheme: Scheme) -> Array:
    """The unit of each row's scales and of its shifts' scales, which are the larger where blocks are on one side."""
    left = _left_over(lows, scales, scheme)[1].reshape(len(lows), -1, scheme.block)
    return np.maximum(units_of(scales), units_of(best_grid(left, replace(scheme, shifted=False))[0]))
