"""GPTQ: quantize a row's weights one after the other, each error made good by the weights still to come.

Frantar et al. 2022, arXiv:2210.17323. The scale of a block is searched when its first column is reached, with each
column's error weighted as the method weights it. What comes out is refined (see :mod:`.refine`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.grids import best_grid
from edgellm_exporters.quantize.plan import Codes, Scheme
from edgellm_exporters.quantize.refine import refined

__all__ = ["gptq"]

# Of the mean diagonal. The paper has 0.01, with which errors on another kind of text are up to a quarter larger.
_DAMPING = 0.2


@torch.no_grad()
def gptq(weight: NDArray[np.float32], hessian: Tensor, scheme: Scheme) -> Codes:
    """Quantize a weight so that its products with real inputs change least.

    Args:
        weight: (rows, columns); columns divide into blocks.
        hessian: (columns, columns), the sum of x x^T over real inputs x.
        scheme: the format.

    Raises:
        QuantizeError: the inputs were not finite.
    """
    block = scheme.block
    rest = torch.tensor(weight.T).contiguous()  # (columns, rows): a column's weights are neighbours
    damped = _damped(hessian)
    factor = _factor(damped)
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
    found = Codes(_turned(codes), _turned(scales), _turned(zeros.to(torch.uint8)))
    return refined(weight, found, damped, scheme)


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


def _damped(hessian: Tensor) -> Tensor:
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always zero: its weights do not matter
    diagonal += _DAMPING * diagonal.mean()
    return damped


def _factor(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper.float()
    except RuntimeError as error:
        raise QuantizeError(f"the calibration inputs of a layer are not finite or degenerate ({error})") from error
