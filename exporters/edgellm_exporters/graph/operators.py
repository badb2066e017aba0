"""Forms of ours for the operators of PyTorch's that models are full of: fewer and plainer nodes than a general form.

A form takes the translation, the traced call and its arguments, and gives the value or values that the call gives; None
leaves the call to the function library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from edgellm_exporters.graph.numbers import NUMBERS
from edgellm_exporters.graph.promotion import cast
from edgellm_exporters.graph.values import onnx_dtype

if TYPE_CHECKING:
    from edgellm_exporters.graph.making import Making

__all__ = ["FORMS"]

Form = Callable[..., Any]
_aten = torch.ops.aten
_LAST = 2**63 - 1


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)


def _plain(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_complex()


def _elementwise(kind: str) -> Form:
    """Of two tensors of the dtype of the result; with numbers or other dtypes, the library does it."""

    def form(made: Making, node: torch.fx.Node, *args: Any, **more: Any) -> Any:
        fits = all(isinstance(x, torch.fx.Node) and _plain(x) for x in args) and not more
        if not fits or any(x.meta["val"].dtype != node.meta["val"].dtype for x in args):
            return None
        return made.op(kind, *map(made.value, args), like=node.meta["val"])

    return form


def _silu(made: Making, node: torch.fx.Node, x: Any) -> Any:
    like = node.meta["val"]
    return made.op("Mul", made.value(x), made.op("Sigmoid", made.value(x), like=like), like=like)


def _gelu(made: Making, node: torch.fx.Node, x: Any, *, approximate: str = "none") -> Any:
    return made.op("Gelu", made.value(x), like=node.meta["val"], approximate=approximate)


def _same(made: Making, node: torch.fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    return made.values[x]


def _dropout(made: Making, node: torch.fx.Node, x: Any, p: float, training: bool) -> Any:
    if training and p:
        raise made.refuse(node, "the forward drops values at random, which no graph does; give dropout self.training")
    return made.values[x]


def _converted(made: Making, node: torch.fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    """Any of the ways to say what dtype, device or layout a tensor should have; only the dtype counts."""
    return cast(made, x, node.meta["val"].dtype) if _plain(node) and _plain(x) else None


def _reshaped(made: Making, node: torch.fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    """Any operator that gives the same numbers in another shape; sizes that stay are not computed again."""
    if not _plain(node) or not _plain(x):
        return None
    before, after = _shape(x), _shape(node)
    if _equal(before, after):
        return made.values[x]
    sizes: list[Any] = [size if isinstance(size, int) else None for size in after]
    for i, size in enumerate(after):
        if sizes[i] is None and i < len(before) and _is_same(before[i], size):
            sizes[i] = 0
    if 0 in [size for size in after if isinstance(size, int)]:
        return None
    if sizes.count(None) == 1:
        sizes[sizes.index(None)] = -1
    elif None in sizes:
        return None
    return made.op("Reshape", made.value(x), made.integers(*sizes), like=node.meta["val"])


def _is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are one, whatever the inputs are."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def _equal(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return len(before) == len(after) and all(map(_is_same, before, after))


def _unsqueezed(made: Making, node: torch.fx.Node, x: Any, dim: int) -> Any:
    if not _plain(node):
        return None
    return made.op("Unsqueeze", made.value(x), made.integers(dim % len(_shape(node))), like=node.meta["val"])


def _transposed(made: Making, node: torch.fx.Node, x: Any, a: int = 0, b: int = 1) -> Any:
    rank = len(_shape(x))
    if not _plain(x):
        return None
    axes = list(range(rank))
    if rank > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return made.op("Transpose", made.value(x), like=node.meta["val"], perm=axes)


def _reversed(made: Making, node: torch.fx.Node, x: Any) -> Any:
    return made.op("Transpose", made.value(x), like=node.meta["val"], perm=[*range(len(_shape(x)))][::-1])


def _permuted(made: Making, node: torch.fx.Node, x: Any, dims: Sequence[int]) -> Any:
    if not _plain(x):
        return None
    return made.op("Transpose", made.value(x), like=node.meta["val"], perm=[d % len(dims) for d in dims])


def _sliced(
    made: Making, node: torch.fx.Node, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if not _plain(x):
        return None
    if _equal(_shape(x), _shape(node)) and step == 1 and start in (0, None):
        return made.values[x]
    bounds = [0 if start is None else start, _LAST if end is None else end]
    ends = [made.vector([bound]) for bound in bounds]
    axis = made.integers(dim % len(_shape(x)))
    return made.op("Slice", made.value(x), *ends, axis, made.integers(step), like=node.meta["val"])


def _selected(made: Making, node: torch.fx.Node, x: Any, dim: int, index: Any) -> Any:
    if not _plain(x):
        return None
    return made.op("Gather", made.value(x), made.value(index), like=node.meta["val"], axis=dim % len(_shape(x)))


def _expanded(made: Making, node: torch.fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    """Sizes that stay are written as 1: a size meets itself."""
    if not _plain(x):
        return None
    before, after = _shape(x), _shape(node)
    before = [1] * (len(after) - len(before)) + before
    if _equal(_shape(x), after):
        return made.values[x]
    given = node.args[1] if isinstance(node.args[1], list | tuple) else [None] * len(after)
    sizes: list[Any] = []
    for old, new, size in zip(before, after, given, strict=True):
        if not isinstance(new, int) and not _is_same(old, new) and not isinstance(size, torch.fx.Node):
            return None
        sizes.append(1 if _is_same(old, new) else new if isinstance(new, int) else size)
    return made.op("Expand", made.value(x), made.vector(sizes), like=node.meta["val"])


def _joined(made: Making, node: torch.fx.Node, tensors: Sequence[Any], dim: int = 0) -> Any:
    if not _plain(node):
        return None
    like = node.meta["val"]
    parts = [t for t in tensors if len(_shape(t)) == like.dim()]  # PyTorch passes over a tensor of shape (0,)
    values = [cast(made, t, like.dtype) for t in parts]
    return values[0] if len(values) == 1 else made.op("Concat", *values, like=like, axis=dim % like.dim())


def _cut(made: Making, node: torch.fx.Node, x: Any, sizes: Any, dim: int = 0) -> Any:
    """Into parts of sizes that the trace tells, or that the call was given."""
    if not _plain(x):
        return None
    like = node.meta["val"]
    axis = dim % len(_shape(x))
    found = [part.shape[axis] for part in like]
    if len(like) == 1:
        return [made.values[x]]
    if not all(isinstance(size, int) for size in found):
        if not isinstance(sizes, list | tuple):
            raise made.refuse(node, "the forward cuts a tensor along a free size into a fixed number of parts; give "
                              "the parts' sizes to torch.split")  # fmt: skip
        found = list(sizes)
    return made.ops("Split", made.value(x), made.vector(found), like=like, axis=axis)


def _unbound(made: Making, node: torch.fx.Node, x: Any, dim: int = 0) -> Any:
    if not _plain(x):
        return None
    axis = dim % len(_shape(x))
    value = made.value(x)
    return [made.op("Gather", value, made.constant(np.array(i)), like=part, axis=axis)
            for i, part in enumerate(node.meta["val"])]  # fmt: skip


def _attended(
    made: Making, node: torch.fx.Node, q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0,
    causal: bool = False, *, scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Softmax of scores; a query that may see nothing gives zeros, as PyTorch has it."""
    if causal:
        raise made.refuse(
            node, "scaled_dot_product_attention(is_causal=True) sees the tokens of one step only, so decoding forgets "
            "what came before; call edgellm.ops.attention with keys and values from the state",
        )  # fmt: skip
    like, weight, keys = node.meta["val"], made.value(v), made.value(k)
    rank = like.dim()
    if enable_gqa and not _is_same(_shape(q)[-3], _shape(k)[-3]):
        keys, weight = (_repeated(made, x, q) for x in (k, v))
    factor = 1 / math.sqrt(_shape(q)[-1]) if scale is None else scale
    dtype = onnx_dtype(like)
    assert dtype is not None
    scaled = made.op("Mul", made.value(q), made.constant(ir.tensor(np.array(factor, dtype=dtype.numpy()))))
    turned = made.op("Transpose", keys, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = made.op("MatMul", scaled, turned)
    allowed = mask is not None and mask.meta["val"].dtype == torch.bool
    if allowed:
        lowest = made.constant(ir.tensor(np.array(np.finfo(np.float32).min).astype(dtype.numpy())))
        scores = made.op("Where", made.value(mask), scores, lowest)
    elif mask is not None:
        scores = made.op("Add", scores, cast(made, mask, like.dtype))
    shares = made.op("Softmax", scores, axis=-1)
    if allowed:
        nothing = made.constant(ir.tensor(np.array(0).astype(dtype.numpy())))
        shares = made.op("Where", made.value(mask), shares, nothing)
    return made.op("MatMul", shares, weight, like=like)


def _repeated(made: Making, x: Any, q: Any) -> ir.Value:
    """Keys or values of few heads, each for the queries of its group."""
    heads, shape = _shape(x)[-3], _shape(x)
    groups = _shape(q)[-3] // heads
    wide = made.op("Unsqueeze", made.value(x), made.integers(len(shape) - 2))
    many = made.op("Expand", wide, made.integers(*[1] * (len(shape) - 2), groups, 1, 1))
    width = shape[-1]
    return made.op("Reshape", many, made.integers(*[0] * (len(shape) - 3), heads * groups, -1, width))


FORMS: Mapping[Any, Form] = {
    **NUMBERS,
    _aten.add.Tensor: _elementwise("Add"),
    _aten.sub.Tensor: _elementwise("Sub"),
    _aten.mul.Tensor: _elementwise("Mul"),
    _aten.div.Tensor: _elementwise("Div"),
    _aten.matmul.default: _elementwise("MatMul"),
    _aten.silu.default: _silu,
    _aten.gelu.default: _gelu,
    _aten.dropout.default: _dropout,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten.contiguous.default: _same,
    _aten.detach.default: _same,
    _aten.lift_fresh_copy.default: _same,
    _aten.to.dtype: _converted,
    _aten.to.device: _converted,
    _aten.to.dtype_layout: _converted,
    _aten.to.other: _converted,
    _aten._to_copy.default: _converted,
    _aten.type_as.default: _converted,
    _aten.view.default: _reshaped,
    _aten.reshape.default: _reshaped,
    _aten._unsafe_view.default: _reshaped,
    _aten.flatten.using_ints: _reshaped,
    _aten.unflatten.int: _reshaped,
    _aten.unsqueeze.default: _unsqueezed,
    _aten.transpose.int: _transposed,
    _aten.t.default: _transposed,
    _aten.numpy_T.default: _reversed,
    _aten.permute.default: _permuted,
    _aten.slice.Tensor: _sliced,
    _aten.select.int: _selected,
    _aten.expand.default: _expanded,
    _aten.expand_as.default: _expanded,
    _aten.cat.default: _joined,
    _aten.split.Tensor: _cut,
    _aten.split.sizes: _cut,
    _aten.split_with_sizes.default: _cut,
    _aten.chunk.default: _cut,
    _aten.unbind.int: _unbound,
    _aten.scaled_dot_product_attention.default: _attended,
}
