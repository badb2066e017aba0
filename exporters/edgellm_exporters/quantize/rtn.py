"""Round to nearest, with the scale of each block searched for the least squared error. Needs no calibration."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import Codes, Scheme, joined

__all__ = ["best_grid", "half_precision", "round_to_nearest"]

Array = NDArray[np.float32]
_ROWS, _THREADS = 256, 4  # rows at a time: scratch memory stays small, and in a core's cache
_SMALLEST = np.float32(2**-24)  # the least positive float16
_EXACT = 1e-9
_TOP_E4M3 = np.float32(448)


def round_to_nearest(weight: Array, scheme: Scheme) -> Codes:
    """Quantize each block of a row on its own.

    Args:
        weight: (rows, columns); columns divide into blocks.
        scheme: the format.
    """
    make = _floating if scheme.floating else _shifted if scheme.shifted else _plain
    pieces = [weight[i : i + _ROWS] for i in range(0, len(weight), _ROWS)]
    with ThreadPoolExecutor(_THREADS) as pool:  # numpy works without the interpreter's lock
        return joined(list(pool.map(lambda piece: make(piece, scheme), pieces)))


def _plain(weight: Array, scheme: Scheme) -> Codes:
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block or columns)
    scales, zeros = best_grid(blocks, scheme)
    codes = np.clip(np.rint(blocks / scales[:, :, None]) + zeros[:, :, None], 0, scheme.top)
    return Codes(codes.astype(np.uint8).reshape(rows, columns), scales, zeros.astype(np.uint8))


def _floating(weight: Array, scheme: Scheme) -> Codes:
    """8-bit floats, the row's largest weight at their top."""
    scales = half_precision(np.abs(weight).max(-1, keepdims=True) / _TOP_E4M3)
    codes = np.clip(weight / scales, -_TOP_E4M3, _TOP_E4M3).astype(ml_dtypes.float8_e4m3fn)
    return Codes(codes.view(np.uint8), scales, np.zeros(scales.shape, np.uint8), floating=True)


def _shifted(weight: Array, scheme: Scheme) -> Codes:
    """A scale, a whole zero, and a shift for what the zero leaves over; the shifts are a small weight of their own."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, scheme.block)
    scales, lows = _floating_grid(blocks, scheme)
    zeros = np.clip(np.rint(-lows / scales), 0, scheme.top).astype(np.float32)
    left = lows + zeros * scales  # (rows, blocks), within half a step of zero unless the block is all on one side
    padding = ((0, 0), (0, -left.shape[1] % scheme.block))
    shifts = _plain(np.pad(left, padding), Scheme(scheme.bits, scheme.block, symmetric=False))
    kept = shifts.dequantize()[:, : left.shape[1], None]
    codes = np.clip(np.rint((blocks - kept) / scales[:, :, None]) + zeros[:, :, None], 0, scheme.top)
    return Codes(
        np.concatenate([codes.astype(np.uint8).reshape(rows, columns), shifts.codes], axis=1),
        np.concatenate([scales, shifts.scales], axis=1),
        np.concatenate([zeros.astype(np.uint8), shifts.zeros], axis=1),
        columns,
    )


def _floating_grid(blocks: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Scale and lowest value of each block with the least squared error; the full range is tried first and kept if it
    is exact, which it is for weights that another quantizer already put on such a grid.
    """
    low, high = blocks.min(-1), blocks.max(-1)
    best_error = np.full(low.shape, np.inf, dtype=np.float32)
    scales, lows = np.zeros_like(low), np.zeros_like(low)
    for factor in sorted(_factors(scheme), key=lambda f: abs(f - 1)):
        scale = half_precision((high - low) * np.float32(factor) / scheme.top)
        # a narrower range is narrower at both ends; the full one starts at the lowest weight itself
        start = low if abs(factor - 1) < _EXACT else (low + high - scale * scheme.top) / 2
        codes = np.clip(np.rint((blocks - start[..., None]) / scale[..., None]), 0, scheme.top)
        error = ((codes * scale[..., None] + start[..., None] - blocks) ** 2).sum(-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        scales, lows = np.where(better, scale, scales), np.where(better, start, lows)
    return scales, lows


def best_grid(blocks: Array, scheme: Scheme, importance: Array | None = None) -> tuple[Array, Array]:
    """The scale and zero of each block with the least weighted squared error, among shrunken and full ranges.

    Args:
        blocks: (..., block).
        scheme: the format.
        importance: weight of each position's error, broadcast to ``blocks``; None for equal.

    Returns:
        Scales and zeros (...), as float32; scales are what float16 holds.
    """
    best_error: Array | None = None
    scales = zeros = np.zeros(blocks.shape[:-1], dtype=np.float32)
    for factor in _factors(scheme):
        scale, zero = _grid(blocks, scheme, factor)
        if scheme.bits < 8:
            scale = _refit(blocks, scale, zero, scheme, importance)
        total = _error(blocks, scale, zero, scheme, importance)
        if best_error is None:
            best_error, scales, zeros = total, scale, zero
            continue
        better = total < best_error
        best_error = np.where(better, total, best_error)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros


def _codes(blocks: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    """Codes less their zero, in float."""
    low, high = -zero[..., None], scheme.top - zero[..., None]
    return np.clip(np.rint(blocks / scale[..., None]), low, high)  # type: ignore[no-any-return]


def _error(blocks: Array, scale: Array, zero: Array, scheme: Scheme, importance: Array | None) -> Array:
    error = (_codes(blocks, scale, zero, scheme) * scale[..., None] - blocks) ** 2
    return np.asarray((error if importance is None else error * importance).sum(-1), dtype=np.float32)


def _refit(blocks: Array, scale: Array, zero: Array, scheme: Scheme, importance: Array | None) -> Array:
    """The scale with the least squared error for the codes that ``scale`` gives."""
    codes = _codes(blocks, scale, zero, scheme)
    weighted = codes if importance is None else codes * importance
    size = (weighted * codes).sum(-1)
    fit = np.where(size > 0, (weighted * blocks).sum(-1) / np.where(size > 0, size, 1), scale)
    rounded = np.copysign(half_precision(np.abs(fit)), np.where(fit == 0, scale, fit))
    return np.asarray(rounded, dtype=np.float32)


def _factors(scheme: Scheme) -> list[float]:
    """Shrinking an 8-bit range gains nothing worth the time; with few codes it does."""
    return [1.0] if scheme.bits == 8 else [float(f) for f in np.linspace(0.7, 1.1, 13)]


def _grid(blocks: Array, scheme: Scheme, factor: float) -> tuple[Array, Array]:
    if not scheme.symmetric:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scale = half_precision((high - low) * factor / scheme.top)
        zero: Array = np.clip(np.rint(-low * factor / scale), 0, scheme.top).astype(np.float32)
        return scale, zero
    middle: Array = np.full(blocks.shape[:-1], scheme.middle, dtype=np.float32)
    if scheme.bits == 8:  # the codes -127 to 127 are enough, and keep both signs alike
        return half_precision(np.abs(blocks).max(-1) / (scheme.middle - 1)), middle
    # there is one code more below zero than above: give it to the sign of the largest weight
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    size = half_precision((np.abs(largest) * factor / scheme.middle).astype(np.float32))
    return size if scheme.positive else np.where(largest > 0, -size, size), middle


def half_precision(scale: Array) -> Array:
    """Positive scales as float16 holds them; none is zero."""
    rounded: Array = np.maximum(scale.astype(np.float16).astype(np.float32), _SMALLEST)
    return rounded
