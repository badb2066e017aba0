"""The scale and zero of each block of weights, searched for the least squared error.

Blocks are worked on as columns, so that every sum over a block is a sum of long rows, and some tens of thousands of
weights at a time, which stay in a core's cache through all candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime.threads import thread_count

__all__ = ["PIECE", "best_grid", "floating_grid", "half_precision", "in_threads"]

Array = NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")
PIECE = 1 << 18  # weights at a time
_SMALLEST = np.float32(2**-24)  # the least positive float16
_EXACT = 1e-9
_LANES, _LONGEST = 8, 128


def in_threads(work: Callable[[T], R], pieces: Sequence[T]) -> list[R]:
    """What ``work`` gives for each piece; numpy works without the interpreter's lock."""
    if len(pieces) < 2:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(thread_count()) as pool:
        return list(pool.map(work, pieces))


def best_grid(blocks: Array, scheme: Scheme, importance: Array | None = None) -> tuple[Array, Array]:
    """The scale and zero of each block with the least weighted squared error, among shrunken and full ranges.

    Args:
        blocks: (..., block).
        scheme: the format.
        importance: weight of each position's error, (block,); None for equal.

    Returns:
        Scales and zeros (...), as float32; scales are what float16 holds.
    """
    rows = blocks.reshape(-1, blocks.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    pieces = [rows[i : i + step] for i in range(0, len(rows), step)]
    found = in_threads(lambda piece: _Blocks(piece, scheme, importance).best(), pieces)
    scales, zeros = (np.concatenate(parts).reshape(blocks.shape[:-1]) for parts in zip(*found, strict=True))
    return scales, zeros


def floating_grid(blocks: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Scale and lowest value of each block with the least squared error; the full range is tried first and kept if it
    is exact, which it is for weights that another quantizer already put on such a grid.

    Args:
        blocks: (..., block).
        scheme: the format.
    """
    scales, lows = _Blocks(blocks.reshape(-1, blocks.shape[-1]), scheme, None).best_floating()
    return scales.reshape(blocks.shape[:-1]), lows.reshape(blocks.shape[:-1])


class _Blocks:
    """Some blocks and the search for their grids.

    Args:
        rows: (blocks, block).
        scheme: the format.
        importance: of each position, (block,), or None.
    """

    def __init__(self, rows: Array, scheme: Scheme, importance: Array | None) -> None:
        self.scheme = scheme
        self._values = np.ascontiguousarray(rows.T)  # (block, blocks)
        self._importance = None if importance is None else importance.astype(np.float32)[:, None]
        self._codes, self._scratch = np.empty_like(self._values), np.empty_like(self._values)

    def best(self) -> tuple[Array, Array]:
        """Scales and whole zeros, (blocks,).

        A candidate is judged by the error that its codes leave with the scale that fits them best, before that scale is
        rounded: a second look at each, with codes for that scale, would take as long again for a thousandth.
        """
        grids = self._grids(_factors(self.scheme))
        if self.scheme.bits == 8:
            return grids[0]
        most: Array | None = None
        for scale, zero in grids:
            fitted, explained = self._fit(scale, zero)
            if most is None:
                most, scales, zeros = explained, fitted, zero
                continue
            better = explained > most
            most = np.where(better, explained, most)
            scales, zeros = np.where(better, fitted, scales), np.where(better, zero, zeros)
        return scales, zeros

    def best_floating(self) -> tuple[Array, Array]:
        """Scales and lowest values, (blocks,)."""
        values, top = self._values, self.scheme.top
        low, high = values.min(0), values.max(0)
        least = np.full(low.shape, np.inf, dtype=np.float32)
        scales, lows = np.zeros_like(low), np.zeros_like(low)
        for factor in sorted(_factors(self.scheme), key=lambda f: abs(f - 1)):
            scale = half_precision((high - low) * np.float32(factor) / top)
            # a narrower range is narrower at both ends; the full one starts at the lowest weight itself
            start = low if abs(factor - 1) < _EXACT else (low + high - scale * top) / 2
            codes = np.subtract(values, start, out=self._codes)
            np.divide(codes, scale, out=codes)
            np.clip(np.rint(codes, out=codes), 0, top, out=codes)
            np.add(np.multiply(codes, scale, out=codes), start, out=codes)
            error = self._squares(codes)
            better = error < least
            least = np.where(better, error, least)
            scales, lows = np.where(better, scale, scales), np.where(better, start, lows)
        return scales, lows

    def _grids(self, factors: Sequence[float]) -> list[tuple[Array, Array]]:
        """Scales and zeros of shrunken and full ranges."""
        values, scheme = self._values, self.scheme
        if not scheme.symmetric:
            low, high = np.minimum(values.min(0), 0), np.maximum(values.max(0), 0)
            scales = [half_precision((high - low) * factor / scheme.top) for factor in factors]
            zeros = [np.clip(np.rint(-low * f / s), 0, scheme.top) for f, s in zip(factors, scales, strict=True)]
            return [(s, z.astype(np.float32)) for s, z in zip(scales, zeros, strict=True)]
        middle: Array = np.full(values.shape[1], scheme.middle, dtype=np.float32)
        if scheme.bits == 8:  # the codes -127 to 127 are enough, and keep both signs alike
            return [(half_precision(np.abs(values, out=self._codes).max(0) / (scheme.middle - 1)), middle)]
        # there is one code more below zero than above: give it to the sign of the largest weight
        place = np.abs(values, out=self._codes).argmax(0)[None]
        largest = np.take_along_axis(values, place, 0)[0]
        sizes = [half_precision((np.abs(largest) * f / scheme.middle).astype(np.float32)) for f in factors]
        return [(np.where(largest > 0, -size, size), middle) for size in sizes]

    def _coded(self, scale: Array, zero: Array) -> Array:
        """Codes less their zero, in float; valid until the next call."""
        codes = np.divide(self._values, scale, out=self._codes)
        np.rint(codes, out=codes)
        return np.minimum(np.maximum(codes, -zero, out=codes), self.scheme.top - zero, out=codes)

    def _fit(self, scale: Array, zero: Array) -> tuple[Array, Array]:
        """The scale that fits the codes of ``scale`` best, and how much of the weights' squares it explains."""
        codes = self._coded(scale, zero)
        if self._importance is None:
            size = _total(np.multiply(codes, codes, out=self._scratch))
            fit = _total(np.multiply(codes, self._values, out=self._scratch))
        else:
            weighted = np.multiply(codes, self._importance, out=self._scratch)
            size = _total(np.multiply(weighted, codes, out=self._codes))
            fit = _total(np.multiply(weighted, self._values, out=self._codes))
        best = np.where(size > 0, fit / np.where(size > 0, size, 1), scale)
        rounded: Array = np.copysign(half_precision(np.abs(best)), np.where(best == 0, scale, best))
        return rounded.astype(np.float32, copy=False), np.where(size > 0, fit * best, 0)

    def _squares(self, wide: Array) -> Array:
        """Each block's weighted squared distance; overwrites ``wide``."""
        np.subtract(wide, self._values, out=wide)
        np.square(wide, out=wide)
        if self._importance is not None:
            np.multiply(wide, self._importance, out=wide)
        return _total(wide)


def _total(values: Array) -> Array:
    """Sums over the first axis, added in the order in which numpy adds neighbours, so that equal sums stay equal."""
    length = len(values)
    if length > _LONGEST:
        half = length // 2 - length // 2 % _LANES
        both: Array = _total(values[:half]) + _total(values[half:])
        return both
    if length % _LANES:
        total: Array = values.sum(0)
        return total
    lanes = values.reshape(length // _LANES, _LANES, -1).sum(0)
    pairs = lanes[0::2] + lanes[1::2]
    fours = pairs[0::2] + pairs[1::2]
    found: Array = fours[0] + fours[1]
    return found


def _factors(scheme: Scheme) -> list[float]:
    """Shrinking an 8-bit range gains nothing worth the time; with few codes it does."""
    return [1.0] if scheme.bits == 8 else [float(f) for f in np.linspace(0.7, 1.1, 13)]


def half_precision(scale: Array) -> Array:
    """Positive scales as float16 holds them; none is zero."""
    rounded: Array = np.maximum(scale.astype(np.float16).astype(np.float32), _SMALLEST)
    return rounded
