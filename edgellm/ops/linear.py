"""A linear layer, X W^T + b, and rows of a table, W[i]: PyTorch's own functions, kept whole in a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.schema import Op

__all__ = ["EMBEDDING", "LINEAR"]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X (..., columns) times the transpose of a weight (rows, columns), plus a bias (rows,): (..., rows)."""
    return F.linear(x, weight, bias)


def embedding_reference(weight: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table (rows, columns) by their numbers (...) int64: (..., columns)."""
    return F.embedding(indices, weight)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = LINEAR.emit(x=x, weight=weight, bias=bias)
    return y


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    y: Tensor = EMBEDDING.emit(weight=weight, indices=indices)
    return y


def _looked_up(
    indices: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *rest: Any,
    **more: Any,
) -> Tensor:  # fmt: skip
    if max_norm is not None:  # it changes the table
        return F.embedding(indices, weight, padding_idx, max_norm, *rest, **more)
    return _embedding(weight, indices)


LINEAR = Op(
    name="Linear",
    inputs=("x", "weight", "bias"),
    outputs=("y",),
    matrices=("weight",),
    products={"weight": "x"},
    scaled_by={"y": ("weight", "bias")},
    functions={F.linear: _linear, torch.ops.aten.linear.default: _linear},
    like=lambda x, weight, bias=None: [(x.dtype, (*x.shape[:-1], weight.shape[0]))],
    reference=linear_reference,
)
EMBEDDING = Op(
    name="Embedding",
    inputs=("weight", "indices"),
    outputs=("rows",),
    matrices=("weight",),
    tables=("weight",),
    functions={F.embedding: _looked_up, torch.embedding: _embedding, torch.ops.aten.embedding.default: _embedding},
    like=lambda weight, indices: [(weight.dtype, (*indices.shape, weight.shape[1]))],
    reference=embedding_reference,
)
