"""Coordinate descent: codes and scales that GPTQ chose, each chosen again in the light of all the others.

GPTQ settles a column before it knows what becomes of the later ones. Going over the columns again, with the same
measure of the error, takes another tenth of it away, on text that was not calibrated on too. As in Nair and Suggala
2024 (CDQuant), arXiv:2406.17542, but with the scales among the coordinates.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm_exporters.quantize.plan import Codes, Scheme
from edgellm_exporters.quantize.scales import stored_scales, units_of

__all__ = ["refined"]

_ROWS = 4096  # of a weight at a time: what is known of every column's error stays small


@torch.no_grad()
def refined(weight: NDArray[np.float32], codes: Codes, hessian: Tensor, scheme: Scheme, sweeps: int = 2) -> Codes:
    """Codes and scales with a smaller error than those given; zeros stay.

    Args:
        weight: (rows, columns).
        codes: its numbers so far.
        hessian: (columns, columns), positive definite; the error of a row is e H e^T.
        scheme: the format, in blocks and without shifts.
        sweeps: how often to go over all columns.
    """
    hessian, pieces = hessian.float(), []
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        scales = stored_scales(codes.scales[rows], scheme)
        piece = _Piece(weight[rows], Codes(codes.codes[rows], scales, codes.zeros[rows]), hessian, scheme)
        for _ in range(sweeps):
            piece.sweep()
        pieces.append((piece.codes.numpy().T, piece.scales.numpy().T))
    found, scales = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Codes(np.ascontiguousarray(found), np.ascontiguousarray(scales), codes.zeros)


class _Piece:
    """Some rows of a weight; all tensors are (columns, rows) or (blocks, rows)."""

    def __init__(self, weight: NDArray[np.float32], codes: Codes, hessian: Tensor, scheme: Scheme) -> None:
        self._hessian, self._block, self._scheme = hessian, scheme.block, scheme
        self.codes = torch.tensor(codes.codes.T).contiguous()
        self.scales = torch.tensor(codes.scales.T).contiguous()
        self._units = units_of(np.abs(codes.scales))  # (rows, 1), which stay
        self._zeros = torch.tensor(codes.zeros.T).float()
        error = codes.dequantize()
        error -= weight
        self._slope = hessian @ torch.from_numpy(error).T  # half of how a row's error grows with each of its weights

    def sweep(self) -> None:
        """Choose every scale and every code again, block after block."""
        for number, start in enumerate(range(0, len(self.codes), self._block)):
            here = slice(start, start + self._block)
            own = self._hessian[here, here]
            slope, zero = self._slope[here].clone(), self._zeros[number]
            levels = self.codes[here] - zero
            before = levels * self.scales[number]
            best = _scale(levels, self.scales[number], slope, own)
            self.scales[number] = self._stored(best)
            wide = levels * self.scales[number]
            slope += own @ (wide - before)
            self._choose(here, number, wide, slope, own)
            self._slope.addmm_(self._hessian[:, here], wide.sub_(before))

    def _stored(self, scales: Tensor) -> Tensor:
        """A block's scales (rows,) as the file will hold them."""
        return torch.from_numpy(stored_scales(scales.numpy()[:, None], self._scheme, self._units))[:, 0]

    def _choose(self, here: slice, number: int, wide: Tensor, slope: Tensor, own: Tensor) -> None:
        """Each column's codes, given all the others; changes ``wide`` and ``slope`` with them."""
        scale, zero = self.scales[number], self._zeros[number]
        for i in range(self._block):
            best = wide[i] - slope[i] / own[i, i]
            codes = best.div_(scale).round_().add_(zero).clamp_(0, self._scheme.top)
            change = (codes - zero) * scale - wide[i]
            slope.addr_(own[:, i], change)
            wide[i] += change
            self.codes[here.start + i] = codes


def _scale(levels: Tensor, scale: Tensor, slope: Tensor, own: Tensor) -> Tensor:
    """The scale with the least error for the same codes; its sign stays."""
    curve = (levels * (own @ levels)).sum(0)
    best = torch.where(curve > 0, scale - (levels * slope).sum(0) / curve.clamp(min=1e-30), scale)
    return torch.where(best * scale > 0, best, scale)
