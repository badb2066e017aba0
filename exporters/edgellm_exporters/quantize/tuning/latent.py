"""A quantized weight that gradients reach: what lies behind its codes, and a factor on each of its scales.

Codes are what a float in units of one code rounds to. The gradient of a weight is taken for that float's, as if nothing
were rounded (Bengio et al. 2013, arXiv:1308.3432), so that the float drifts over the border between two codes where
that pays. Cheng et al. 2023 (SignRound), arXiv:2309.05516, learn offsets of at most half a code; here the float may go
further, as in Chen et al. 2024 (Block-AP), arXiv:2407.11062.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm_exporters.quantize.plan import Codes, Scheme
from edgellm_exporters.quantize.scales import stored_scales

__all__ = ["LatentWeight"]

_INSIDE = 0.49  # of a code: a latent float rounds to the code that it begins with


class LatentWeight:
    """The numbers of one weight, to be learned.

    Args:
        weight: what the codes stand for, (rows, columns).
        codes: to begin with; in blocks, without shifts.
        scheme: their format.
        column: what the weight's columns were multiplied with before it was quantized, (columns,).
        row: what its rows were multiplied with, (rows,).
        move_codes: whether codes may change; otherwise only scales do, and ``weight`` is not read.
    """

    def __init__(
        self, weight: Tensor | None, codes: Codes, scheme: Scheme, column: Tensor, row: Tensor, *, move_codes: bool
    ) -> None:  # fmt: skip
        self._start, self._scheme, self._top = codes, scheme, scheme.top
        rows, blocks = codes.scales.shape
        self._zeros = torch.from_numpy(codes.zeros)[:, :, None].float()  # (rows, blocks, 1)
        self._scales = torch.from_numpy(codes.scales)[:, :, None]
        self._column, self._row = column, row[:, None]
        whole = torch.from_numpy(codes.codes).view(rows, blocks, -1)  # (rows, blocks, block)
        self.latent: Tensor | None = None
        self._whole = whole
        if move_codes:
            assert weight is not None
            wanted = (weight * column * self._row).view(whole.shape) / self._scales + self._zeros
            first = whole.float()
            self.latent = torch.maximum(torch.minimum(wanted, first + _INSIDE), first - _INSIDE).requires_grad_()
        self.factor = torch.ones(rows, blocks, 1, requires_grad=True)

    @property
    def learned(self) -> list[Tensor]:
        """What gradients are wanted of."""
        return [self.factor] if self.latent is None else [self.factor, self.latent]

    def __call__(self) -> Tensor:
        """The weight that they stand for now, (rows, columns), through which gradients flow."""
        latent = self._whole if self.latent is None else self.latent
        wide: Tensor = _Dequantized.apply(latent, self._scales * self.factor, self._zeros, self._top)  # type: ignore[no-untyped-call]
        return wide.view(len(wide), -1) / self._column / self._row

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Latent floats stay where their codes are, so that none is lost for good beyond the last code."""
        if self.latent is not None:
            self.latent.clamp_(-_INSIDE, self._top + _INSIDE)

    def codes(self) -> Codes:
        """The numbers as they are now, scales as the file will hold them; the sign of a scale stays."""
        if self.latent is None:
            codes = self._start.codes
        else:
            rounded = self.latent.detach().round().clamp(0, self._top).to(torch.uint8)
            codes = rounded.numpy().reshape(self._start.codes.shape)
        scales: NDArray[Any] = (self._scales * self.factor.detach())[:, :, 0].numpy()
        scales = np.copysign(stored_scales(np.abs(scales), self._scheme), self._start.scales)
        return Codes(codes, scales, self._start.zeros)


class _Dequantized(torch.autograd.Function):
    """(code - zero) * scale, where codes are rounded latent floats, or codes that are given and not learned.

    Only what is given is kept for the gradient: bytes, where codes do not move.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(latent, scales, zeros)
        ctx.top = top
        return _levels(latent, zeros, top).mul_(scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        latent, scales, zeros = ctx.saved_tensors
        (gradient,) = gradients
        of_scales = (gradient * _levels(latent, zeros, ctx.top)).sum(-1, keepdim=True)
        return gradient * scales if ctx.needs_input_grad[0] else None, of_scales, None, None


def _levels(latent: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Codes less their zeros, as floats of their own memory."""
    codes = latent.round().clamp_(0, top) if latent.is_floating_point() else latent.float()
    return codes.sub_(zeros)
