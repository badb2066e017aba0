"""Sizes that a traced program computes with: each is a whole number of the graph's own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from edgellm_exporters.graph.values import onnx_dtype

if TYPE_CHECKING:
    from edgellm_exporters.graph.making import Making

__all__ = ["NUMBERS"]

Form = Callable[..., Any]


def _size(made: Making, node: torch.fx.Node, x: Any, dim: int) -> Any:
    axis = dim % x.meta["val"].dim()
    shape = made.op("Shape", made.value(x), start=axis, end=axis + 1)
    return made.op("Squeeze", shape, made.integers(0), like=node.meta["val"])


def _number(kind: str) -> Form:
    """Arithmetic or a comparison of sizes."""

    def form(made: Making, node: torch.fx.Node, *args: Any) -> Any:
        if any(isinstance(a, torch.fx.Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in args):
            return None
        return made.op(kind, *_alike(made, args), like=node.meta["val"])

    return form


def _alike(made: Making, args: Sequence[Any]) -> list[ir.Value]:
    """Numbers in one dtype: fractions if one of them is."""
    values = [made.value(a) for a in args]
    if any(v.dtype == ir.DataType.FLOAT for v in values):
        return [v if v.dtype == ir.DataType.FLOAT else made.op("Cast", v, to=int(ir.DataType.FLOAT), like=0.0)
                for v in values]  # fmt: skip
    return values


def _quotient(made: Making, node: torch.fx.Node, a: Any, b: Any) -> Any:
    """Rounded down; ONNX rounds towards zero."""
    x, y = _alike(made, (a, b))
    return made.op("Div", made.op("Sub", x, made.op("Mod", x, y)), y, like=node.meta["val"])


def _fraction(made: Making, node: torch.fx.Node, a: Any, b: Any) -> Any:
    parts = [made.op("Cast", made.value(x), to=int(ir.DataType.FLOAT), like=0.0) for x in (a, b)]
    return made.op("Div", *parts, like=node.meta["val"])


def _unequal(made: Making, node: torch.fx.Node, a: Any, b: Any) -> Any:
    return made.op("Not", made.op("Equal", *_alike(made, (a, b))), like=node.meta["val"])


def _as_number(made: Making, node: torch.fx.Node, x: Any) -> Any:
    dtype = onnx_dtype(node.meta["val"])
    assert dtype is not None
    return made.op("Cast", made.value(x), to=int(dtype), like=node.meta["val"])


def _rounded(kind: str) -> Form:
    def form(made: Making, node: torch.fx.Node, x: Any) -> Any:
        if made.value(x).dtype == ir.DataType.INT64:
            return made.values[x]
        whole = made.op(kind, made.value(x), like=0.0)
        return made.op("Cast", whole, to=int(ir.DataType.INT64), like=node.meta["val"])

    return form


def _total(made: Making, node: torch.fx.Node, parts: Sequence[Any]) -> Any:
    return made.op("Sum", *map(made.value, parts), like=node.meta["val"])


def _chosen(made: Making, node: torch.fx.Node, test: Any, a: Any, b: Any) -> Any:
    return made.op("Where", made.value(test), *_alike(made, (a, b)), like=node.meta["val"])


NUMBERS: Mapping[Any, Form] = {
    torch.ops.aten.sym_size.int: _size,
    operator.add: _number("Add"),
    operator.sub: _number("Sub"),
    operator.mul: _number("Mul"),
    operator.mod: _number("Mod"),
    operator.pow: _number("Pow"),
    operator.neg: _number("Neg"),
    operator.abs: _number("Abs"),
    operator.floordiv: _quotient,
    operator.truediv: _fraction,
    operator.eq: _number("Equal"),
    operator.ne: _unequal,
    operator.lt: _number("Less"),
    operator.le: _number("LessOrEqual"),
    operator.gt: _number("Greater"),
    operator.ge: _number("GreaterOrEqual"),
    operator.and_: _number("And"),
    operator.or_: _number("Or"),
    math.ceil: _rounded("Ceil"),
    math.floor: _rounded("Floor"),
    torch.sym_float: _as_number,
    torch.sym_int: _as_number,
    torch.sym_max: _number("Max"),
    torch.sym_min: _number("Min"),
    torch.sym_not: _number("Not"),
    torch.sym_ite: _chosen,
    torch.sym_sum: _total,
}
