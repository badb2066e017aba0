"""The dtype that PyTorch computes a call in, where ONNX takes one dtype only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnx_ir.tensor_adapters
import torch

if TYPE_CHECKING:
    from edgellm_exporters.graph.making import Making

__all__ = ["cast", "promoted"]

_KEPT = ("condition", "mask")  # tensors of a pointwise operator that are not numbers of its result
_JOINED = ("aten::cat", "aten::stack", "aten::concat", "aten::concatenate", "aten::hstack", "aten::vstack")
_NUMERIC = ("Tensor", "Optional[Tensor]", "List[Tensor]", "number", "Optional[number]")  # types in a schema
_COUNTED = ("aten::sum", "aten::cumsum", "aten::prod", "aten::cumprod")  # of whole numbers, they are in int64


def cast(made: Making, node: Any, dtype: torch.dtype) -> ir.Value:
    """A tensor in a dtype: itself if it has it."""
    value = made.value(node)
    wanted = ir.tensor_adapters.from_torch_dtype(dtype)
    if value.dtype == wanted:
        return value
    found = made.op("Cast", value, to=int(wanted))
    found.type, found.shape = ir.TensorType(wanted), value.shape
    return found


def promoted(made: Making, node: torch.fx.Node) -> list[Any]:
    """A call's arguments, its tensors cast to the dtype that PyTorch computes in."""
    target: Any = node.target
    schema, wanted = getattr(target, "_schema", None), _computed_in(node)
    if schema is None or wanted is None:
        return list(node.args)

    def as_computed(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [as_computed(each) for each in argument]
        return cast(made, argument, wanted) if isinstance(argument, torch.fx.Node) else argument

    return [
        as_computed(argument) if str(known.type) in _NUMERIC and known.name not in _KEPT else argument
        for known, argument in zip(schema.arguments, node.args, strict=False)
    ]


def _computed_in(node: torch.fx.Node) -> torch.dtype | None:
    """The one dtype that a call's tensors are brought to; None where each keeps its own."""
    target, like = node.target, node.meta.get("val")
    name = getattr(target, "_schema", None) and target._schema.name  # type: ignore[union-attr]
    if not isinstance(like, torch.Tensor) or like.is_complex():
        return None
    if name in _JOINED or (name in _COUNTED and not like.dtype.is_floating_point):
        return like.dtype
    if torch.Tag.pointwise not in getattr(target, "tags", ()):
        return None
    given = [a for a, kept in _numbers(node) if not kept]
    if not any(isinstance(a, torch.Tensor) for a in given):
        return None
    from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

    computed, _ = elementwise_dtypes(*given, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)
    if like.dtype.is_floating_point and not computed.is_floating_point:
        return like.dtype  # such as a quotient of whole numbers
    return computed


def _numbers(node: torch.fx.Node) -> list[tuple[Any, bool]]:
    """What a pointwise call computes with, and whether it only chooses."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = [(a.meta.get("val") if isinstance(a, torch.fx.Node) else a, name in _KEPT)
             for name, a in zip(names, node.args, strict=False)]  # fmt: skip
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, int, float)
    return [(a, kept) for a, kept in given if isinstance(a, kinds)]
