"""GPTQ: quantize a row's weights one after the other, each error made good by the weights still to come.

Frantar et al. 2022, arXiv:2210.17323. The scale of a block is searched when its first column is reached, with each
column's error weighted as the method weights it. What comes out is refined (see :mod:`.refine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm_exporters.quantize.curvature import Curvature
from edgellm_exporters.quantize.grids import best_grid
from edgellm_exporters.quantize.plan import Codes, Scheme, joined
from edgellm_exporters.quantize.refine import refined

__all__ = ["Rows", "gptq", "gptq_by_rows"]

_ROWS_BYTES = 64 << 20  # of float32 weights that are worked on at a time: a vocabulary's table is never whole
Array = NDArray[np.float32]
Rows = Callable[[int, int], Array]


def gptq(weight: Array, hessian: Tensor, scheme: Scheme) -> Codes:
    """Quantize a weight so that its products with real inputs change least.

    Args:
        weight: (rows, columns); columns divide into blocks.
        hessian: (columns, columns), the sum of x x^T over real inputs x.
        scheme: the format.

    Raises:
        QuantizeError: the inputs were not finite.
    """
    parts = gptq_by_rows(lambda start, stop: weight[start:stop], len(weight), Curvature(hessian), scheme)
    return joined(parts, len(weight))


def gptq_by_rows(rows: Rows, count: int, curvature: Curvature, scheme: Scheme) -> Iterator[Codes]:
    """The same of a weight that is read some rows at a time: no row depends on another.

    Args:
        rows: gives those from one to before another.
        count: how many there are.
        curvature: of the products' inputs.
        scheme: the format.

    Yields:
        The codes of the rows that were read together, in their order.

    Raises:
        QuantizeError: the inputs were not finite.
    """
    step = max(1, _ROWS_BYTES // (4 * curvature.columns))
    for start in range(0, count, step):
        yield _quantized(rows(start, min(start + step, count)), curvature, scheme)


@torch.no_grad()
def _quantized(weight: Array, curvature: Curvature, scheme: Scheme) -> Codes:
    return refined(weight, _in_turn(weight, curvature.factor(), scheme), curvature.damped(), scheme)


def _in_turn(weight: Array, factor: Tensor, scheme: Scheme) -> Codes:
    """Codes column by column; ``factor`` is of the inverse."""
    block = scheme.block
    rest = torch.tensor(weight.T).contiguous()  # (columns, rows): a column's weights are neighbours
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    scales, zeros = (torch.empty(rest.shape[0] // block, rest.shape[1]) for _ in range(2))
    for number, start in enumerate(range(0, len(rest), block)):
        here, later = slice(start, start + block), slice(start + block, None)
        triangle = factor[here, here]
        importance = (1 / triangle.diagonal() ** 2).numpy()
        scale, zero = (torch.from_numpy(a) for a in best_grid(rest[here].numpy().T, scheme, importance))
        codes[here], errors = _block(rest[here], triangle, scale, zero, scheme.top)
        rest[later].addmm_(factor[here, later].T, errors, alpha=-1)
        scales[number], zeros[number] = scale, zero
    return Codes(_turned(codes), _turned(scales), _turned(zeros.to(torch.uint8)))


def _turned(part: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(part.numpy().T)


def _block(block: Tensor, triangle: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes of one block of columns (columns, rows), whose content is used up, and the errors that the columns after it
    must make good.
    """
    codes, errors = torch.empty(block.shape, dtype=torch.uint8), torch.empty_like(block)
    for i in range(len(block)):
        chosen = (block[i] / scale).round_().add_(zero).clamp_(0, top)
        codes[i] = chosen
        errors[i] = (block[i] - (chosen - zero) * scale) / triangle[i, i]
        block[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors
