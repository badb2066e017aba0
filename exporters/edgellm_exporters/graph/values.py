"""What a traced value is in a graph: its dtype and its shape, free sizes under the tracer's names."""

from __future__ import annotations

from typing import Any, TypeVar

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch

__all__ = ["onnx_dtype", "typed"]

V = TypeVar("V", bound=ir.Value)


def onnx_dtype(like: Any) -> ir.DataType | None:
    """The dtype of a traced tensor or number; complex numbers are pairs of real ones."""
    if isinstance(like, torch.Tensor):
        return ir.tensor_adapters.from_torch_dtype(like.dtype.to_real() if like.is_complex() else like.dtype)
    if isinstance(like, bool | torch.SymBool):
        return ir.DataType.BOOL
    if isinstance(like, int | torch.SymInt):
        return ir.DataType.INT64
    return ir.DataType.FLOAT if isinstance(like, float | torch.SymFloat) else None


def typed(value: V, like: Any) -> V:
    """Tell a value the dtype and shape of a traced tensor or number, or of another value."""
    if isinstance(like, ir.Value):
        value.type, value.shape = like.type, like.shape
    elif (dtype := onnx_dtype(like)) is not None:
        sizes = list(like.shape) if isinstance(like, torch.Tensor) else []
        if isinstance(like, torch.Tensor) and like.is_complex():
            sizes.append(2)
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape([size if isinstance(size, int) else str(size) for size in sizes])
    return value
