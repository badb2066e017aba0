"""Root mean square norms (Zhang and Sennrich 2019, arXiv:1910.07467): PyTorch's own function, kept whole in a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.schema import REQUIRED, Op

__all__ = ["ADD_RMS_NORM", "RMS_NORM"]


def rms_norm_reference(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """X / sqrt(mean(x^2) + epsilon) * weight over the last axis; weight is (features,)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def add_rms_norm_reference(a: Tensor, b: Tensor, weight: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of a sum of two tensors of one shape, and the sum."""
    total = a + b
    return rms_norm_reference(total, weight, epsilon=epsilon), total


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if len(shape) != 1:
        raise ValueError(f"rms_norm over {len(shape)} axes cannot be exported; normalise the last axis only")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    weight = torch.ones(shape[0], dtype=x.dtype) if weight is None else weight
    y: Tensor = RMS_NORM.emit(x=x, weight=weight, epsilon=eps)
    return y


RMS_NORM = Op(
    name="RMSNorm",
    inputs=("x", "weight"),
    outputs=("y",),
    attributes={"epsilon": REQUIRED},
    scaled_by={"y": ("weight",)},
    functions={F.rms_norm: _rms_norm, torch.rms_norm: _rms_norm, torch.ops.aten.rms_norm.default: _rms_norm},
    like=lambda x, weight, epsilon: [x],
    reference=rms_norm_reference,
)
ADD_RMS_NORM = Op(  # no function of PyTorch's: a pass makes it
    name="AddRMSNorm",
    inputs=("a", "b", "weight"),
    outputs=("y", "total"),
    attributes={"epsilon": REQUIRED},
    scaled_by={"y": ("weight",)},
    like=lambda a, b, weight, epsilon: [a, a],
    reference=add_rms_norm_reference,
)
