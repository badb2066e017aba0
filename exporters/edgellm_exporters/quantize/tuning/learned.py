"""A quantized weight that is learned end to end in little memory: gradients are used up where they arise.

The optimizer is Adam (Kingma and Ba 2015, arXiv:1412.6980) whose second moment is one number for each block, for a
block's weights share a scale (Zhang et al. 2024, Adam-mini, arXiv:2406.16793). What moves is as in :mod:`latent`: a
float behind each code, and a factor on each scale. Floats are kept as distances from the codes that were there, in 16
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_exporters.quantize.plan import Codes, Scheme
from edgellm_exporters.quantize.scales import stored_scales

__all__ = ["LearnedWeight", "product", "whole"]

_INSIDE = 0.49  # of a code: a float rounds to the code that it begins with
_CHUNK = 1 << 18  # numbers that are worked on at a time
_FIRST, _SECOND = 0.9, 0.99  # decay of the moments
_TINY = 1e-20
_BEGIN = 0.5  # of the way to the weight that was rounded: at a border, floats would cross it by chance


class LearnedWeight:
    """The numbers of one weight.

    Args:
        codes: to begin with; in blocks, without shifts.
        scheme: their format.
        column: what the weight's columns were multiplied with before it was quantized, (columns,).
        row: what its rows were multiplied with, (rows,).
    """

    def __init__(self, codes: Codes, scheme: Scheme, column: Tensor, row: Tensor) -> None:
        self._start, self._scheme, self._top = codes, scheme, scheme.top
        rows, blocks = codes.scales.shape
        self._codes = torch.from_numpy(codes.codes).view(rows, blocks, -1)
        self._scales = torch.from_numpy(codes.scales)[:, :, None]
        self._zeros = torch.from_numpy(codes.zeros)[:, :, None].float()
        self._inverse = None if bool((column == 1).all()) else 1 / column
        self._row = None if bool((row == 1).all()) else 1 / row[:, None]
        self._moved = torch.zeros(self._codes.shape, dtype=torch.float16)
        self._momentum = torch.zeros(self._codes.shape, dtype=torch.bfloat16)
        self._square = torch.zeros(rows, blocks, 1)
        self._factor = torch.ones(rows, blocks, 1)
        self._of_factor, self._factor_square = torch.zeros(rows, blocks, 1), torch.zeros(rows, blocks, 1)
        self._fresh, self._steps = True, 0
        self._made: Tensor | None = None  # the weight as it is until the next step

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((len(self._codes), self._codes.shape[1] * self._codes.shape[2]))

    def begin_at(self, weight: Tensor) -> None:
        """Let each float begin on the way from its code to where the weight was, as far as the code allows.

        Args:
            weight: (rows, columns), multiplied with ``column`` and ``row``.
        """
        self._made = None
        for some in self._chunks():
            wanted = weight[some].view(self._codes[some].shape) / self._scales[some] + self._zeros[some]
            self._moved[some] = (wanted - self._codes[some]).clamp_(-_INSIDE, _INSIDE).mul_(_BEGIN).half()

    def _chunks(self) -> Iterator[slice]:
        rows = max(1, _CHUNK // max(1, self.shape[1]))
        return (slice(start, start + rows) for start in range(0, len(self._codes), rows))

    def _levels(self, some: slice | Tensor) -> Tensor:
        """Codes less their zeros, as floats of their own memory."""
        codes = self._moved[some].float().add_(self._codes[some]).round_().clamp_(0, self._top)
        return codes.sub_(self._zeros[some])

    @torch.no_grad()
    def rows(self, some: slice | Tensor) -> Tensor:
        """What some rows stand for, float32."""
        wide = self._levels(some).mul_(self._scales[some] * self._factor[some])
        wide = wide.view(len(wide), -1)
        if self._inverse is not None:
            wide.mul_(self._inverse)
        return wide if self._row is None else wide.mul_(self._row[some])

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of it; made once a step, and not to be written to."""
        if self._made is None or self._made.dtype != dtype:
            self._made = torch.empty(self.shape, dtype=dtype)
            for some in self._chunks():
                self._made[some] = self.rows(some)
        return self._made

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Use a gradient up; several of one step are added.

        Args:
            gradient: of the weight as :meth:`whole` gives it, (rows, columns).
        """
        first, second = (_FIRST, _SECOND) if self._fresh else (1.0, 1.0)
        self._fresh = False
        self._of_factor *= first
        self._factor_square *= second
        self._square *= second
        for some in self._chunks():
            given = gradient[some].float()
            if self._inverse is not None:
                given = given * self._inverse  # a gradient may be others', too
            if self._row is not None:
                given = given * self._row[some]
            given = given.view(self._codes[some].shape)
            of_factor = (self._levels(some).mul_(given)).sum(-1, keepdim=True).mul_(self._scales[some])
            self._of_factor[some].add_(of_factor, alpha=1 - _FIRST)
            self._factor_square[some].addcmul_(of_factor, of_factor, value=1 - _SECOND)
            self._square[some].add_(given.square().mean(-1, keepdim=True), alpha=1 - _SECOND)
            momentum = self._momentum[some]
            momentum.copy_(momentum.float().mul_(first).add_(given, alpha=1 - _FIRST))

    @torch.no_grad()
    def step(self, *, codes: float, scales: float) -> None:
        """Move by what was taken since the last step.

        Args:
            codes: the rate of the floats behind codes, in codes.
            scales: the rate of the scales' factors.
        """
        if self._fresh:
            return
        self._fresh, self._steps, self._made = True, self._steps + 1, None
        first, second = 1 - _FIRST**self._steps, 1 - _SECOND**self._steps
        pace = _pace(self._factor_square, self._factor_square.mean(), second)
        self._factor.addcdiv_(self._of_factor, pace, value=-scales / first)
        self._factor.clamp_(min=0.1)
        mean = self._square.mean()
        for some in self._chunks():
            whole = self._codes[some]
            pace = _pace(self._square[some], mean, second)
            moved = self._momentum[some].float().div_(pace).mul_(-codes / first).add_(self._moved[some]).add_(whole)
            self._moved[some] = moved.clamp_(-_INSIDE, self._top + _INSIDE).sub_(whole)

    def codes(self) -> Codes:
        """The numbers as they are now, scales as the file will hold them; the sign of a scale stays."""
        codes = np.empty_like(self._start.codes)
        for some in self._chunks():
            found = self._moved[some].float().add_(self._codes[some]).round_().clamp_(0, self._top)
            codes[some] = found.to(torch.uint8).numpy().reshape(codes[some].shape)
        scales = stored_scales((self._scales * self._factor)[:, :, 0].numpy(), self._scheme)
        return Codes(codes, scales, self._start.zeros, self._start.columns, self._start.floating)


def _pace(square: Tensor, mean: Tensor, decayed: float) -> Tensor:
    """What a block's gradient is divided by: its size, or that of the whole weight's blocks where that is larger.

    The rows of words that are never met have next to no gradient, and would drift as fast as any by what is chance.
    """
    return torch.maximum(square, mean).div_(decayed).sqrt_().add_(_TINY)


class _Product(torch.autograd.Function):
    """X W^T, where W is not kept for the gradient but asked for again, and its own gradient is used up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, weight: LearnedWeight, dtype: torch.dtype) -> Tensor:
        given = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.save_for_backward(given)
        ctx.weight, ctx.shape = weight, x.shape
        return (given @ weight.whole(dtype).t()).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (given,) = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(given.dtype)
        back = None
        if ctx.needs_input_grad[0]:
            back = (gradient @ ctx.weight.whole(given.dtype)).float().view(ctx.shape)
        ctx.weight.take(gradient.t() @ given)
        return back, None, None, None


def product(x: Tensor, anchor: Tensor, weight: LearnedWeight, dtype: torch.dtype) -> Tensor:
    """X (..., columns) times the transpose of a learned weight, which takes its gradient when that arises.

    Args:
        x: float32.
        anchor: any tensor that needs a gradient, so that there is one where x needs none.
        weight: (rows, columns).
        dtype: to multiply in.
    """
    y: Tensor = _Product.apply(x, anchor, weight, dtype)  # type: ignore[no-untyped-call]
    return y


class _Whole(torch.autograd.Function):
    """A learned weight as a tensor, for functions other than products."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: LearnedWeight) -> Tensor:
        ctx.weight = weight
        return weight.whole(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.weight.take(gradients[0])
        return None, None


def whole(anchor: Tensor, weight: LearnedWeight) -> Tensor:
    """A learned weight, float32, which takes its gradient when that arises.

    Args:
        anchor: any tensor that needs a gradient.
        weight: (rows, columns).
    """
    found: Tensor = _Whole.apply(anchor, weight)  # type: ignore[no-untyped-call]
    return found
