"""Attention with capped scores on ONNX Runtime's CPU: its kernel for few scores, products and a softmax for many.

GroupQueryAttention caps one score after another with the C library's tanh, and leaves its blocked path for that: 256
tokens of 4 heads after 768 others take it 26 ms, the nodes here 2 ms, and without a cap 1.7 ms. For one token a row, or
for a few over few, it is the quicker: less is to be started. An If chooses; both branches write the cache in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.branches import choose
from edgellm_exporters.lowering.context import Lowering, shape_of

__all__ = ["capped_attention"]

Kernel = Callable[[], Sequence[ir.Value]]
_FEW = 2048  # scores that the kernel caps in the time that the further nodes take to be started


class _Places(NamedTuple):
    """Where a chunk's tokens stand and what they see; for few scores, nothing that means anything."""

    positions: ir.Value  # (batch, time), within the rotation's table
    slots: ir.Value  # (batch, kv_heads, time, 3), where each key and value goes
    start: ir.Value  # (1,), the first slot that any token sees
    stop: ir.Value  # (1,), one past the last
    mask: ir.Value  # (batch, 1, queries, stop - start), added to the scores of the queries that share a key


def capped_attention(
    context: Lowering, view: View, longest: ir.Value, packed: ir.Value | None, kernel: Kernel,
    scales: Sequence[ir.Value | None], *, half: bool,
) -> Sequence[ir.Value]:  # fmt: skip
    """Lower an Attention whose scores are capped.

    Args:
        context: of the lowering.
        view: the node.
        longest: the tokens of the longest row with the new ones, a scalar.
        packed: queries, keys and values side by side, where there is such a tensor.
        kernel: its form as GroupQueryAttention.
        scales: of the features of an 8-bit cache, keys' and values' (kv_heads, 1, head_dim); None for floats.
        half: whether the cache is kept in float16.
    """
    few = _few(context, view, longest)
    places = _places(context, view, few)
    return choose(
        context, str(view.y.name), few, kernel, lambda: _written_out(context, view, packed, places, scales, half)
    )


def _few(context: Lowering, view: View, longest: ir.Value) -> ir.Value:
    """Whether there are few scores besides those of one token a row."""

    def make() -> ir.Value:
        more = context.op("Sub", context.op("Shape", context.input("tokens"), start=1, end=2), context.const([1]))
        scores = context.op("Mul", more, context.op("Cast", longest, to=ir.DataType.INT64))
        return context.op("LessOrEqual", scores, context.const([_FEW // view.num_heads]))

    return context.once(("few", longest, view.num_heads), make)


def _places(context: Lowering, view: View, few: ir.Value) -> _Places:
    """Made once for all layers of one window, and for many scores only."""
    limit = 2**31 if view.cos is None else shape_of(view.cos)[0]
    shape = (view.num_kv_heads, view.num_heads // view.num_kv_heads)

    def nothing() -> list[ir.Value]:
        numbers = context.ops(4, "Split", context.const([0] * 4), axis=0, num_outputs=4)
        return [*numbers, context.op("Identity", context.const([0.0], np.float32))]

    def make() -> _Places:
        name = f"{view.y.name}.places"
        return _Places(*choose(context, name, few, nothing, lambda: _computed(context, view, limit, *shape)))

    return context.once(("places", view.past_lengths, view.window, limit, *shape), make)


def _computed(context: Lowering, view: View, limit: int, kv_heads: int, shared: int) -> list[ir.Value]:
    past = context.op("Cast", view.past_lengths, to=ir.DataType.INT64)  # (batch,)
    time = context.op("Squeeze", context.op("Shape", context.input("tokens"), start=1, end=2))
    steps = context.op("Range", context.const(0), time, context.const(1))
    places = context.op("Add", context.op("Unsqueeze", past, context.const([1])), steps)  # (batch, time)
    slots = _indices(context, places, kv_heads)
    stop = context.op("Add", context.op("ReduceMax", places, context.const([0, 1]), keepdims=0), context.const(1))
    start = context.const(0)
    if view.window:
        least = context.op("ReduceMin", past, context.const([0]), keepdims=0)
        start = context.op("Max", context.op("Sub", least, context.const(view.window - 1)), start)
    keys = context.op("Range", start, stop, context.const(1))
    queries = context.op("Unsqueeze", places, context.const([1, 3]))  # (batch, 1, time, 1)
    seen = context.op("LessOrEqual", keys, queries)
    if view.window:
        seen = context.op(
            "And", seen, context.op("Greater", keys, context.op("Sub", queries, context.const(view.window)))
        )
    mask = context.op("Where", seen, context.const(0, np.float32), context.const(-np.inf, np.float32))
    clipped = context.op("Min", places, context.const(limit - 1))  # padding may point past the table
    return [clipped, slots, *(context.op("Unsqueeze", x, context.const([0])) for x in (start, stop)),
            context.op("Concat", *[mask] * shared, axis=2)]  # fmt: skip


def _indices(context: Lowering, places: ir.Value, kv_heads: int) -> ir.Value:
    """Row, head and slot of each new key, (batch, kv_heads, time, 3)."""
    batch = context.op("Shape", places, start=0, end=1)
    rows = context.op("Range", context.const(0), context.op("Squeeze", batch), context.const(1))
    shape = context.op("Concat", batch, context.const([kv_heads]), context.op("Shape", places, start=1, end=2), axis=0)
    parts = [
        context.op("Unsqueeze", rows, context.const([1, 2])),
        context.const(np.arange(kv_heads)[None, :, None]),
        context.op("Unsqueeze", places, context.const([1])),
    ]
    each = [context.op("Unsqueeze", context.op("Expand", part, shape), context.const([3])) for part in parts]
    return context.op("Concat", *each, axis=3)


def _written_out(
    context: Lowering,
    view: View,
    packed: ir.Value | None,
    places: _Places,
    scales: Sequence[ir.Value | None],
    half: bool,
) -> list[ir.Value]:
    kv_heads, shared = view.num_kv_heads, view.num_heads // view.num_kv_heads
    dim = int(view.past_k.shape[3])
    parts: Sequence[ir.Value] = (view.q, view.k, view.v)
    if packed is not None:  # split here: the kernel takes it whole
        sizes = [dim * count for count in (view.num_heads, kv_heads, kv_heads)]
        parts = context.ops(3, "Split", packed, context.const(sizes), axis=-1)
    q, k, v = standard.heads_of(context, view, parts)
    if view.cos is not None:
        q, k = (context.op("RotaryEmbedding", x, view.cos, view.sin, places.positions) for x in (q, k))
    present = [
        context.op("ScatterND", past, places.slots, _narrow(context, new, scale, half))
        for past, new, scale in zip((view.past_k, view.past_v), (k, v), scales, strict=True)
    ]
    keys, values = (
        _wide(context, context.op("Slice", cache, places.start, places.stop, context.const([2])), scale, half)
        for cache, scale in zip(present, scales, strict=True)
    )
    q = context.op("Reshape", q, context.const([0, kv_heads, -1, dim]))  # (batch, kv_heads, shared * time, head_dim)
    capped = context.op("FusedMatMul", q, keys, domain="com.microsoft", transB=1, alpha=view.scale / view.softcap)
    scores = context.op("Mul", context.op("Tanh", capped), context.const(view.softcap, np.float32))
    shares = context.op("Softmax", context.op("Add", scores, places.mask), axis=-1)
    y = context.op("MatMul", shares, values)
    y = context.op("Reshape", y, context.const([0, kv_heads * shared, -1, dim]))
    merged = context.op("Transpose", y, perm=[0, 2, 1, 3])  # (batch, time, heads, head_dim)
    return [context.op("Reshape", merged, context.const([0, 0, -1])), *present]


def _narrow(context: Lowering, x: ir.Value, scale: ir.Value | None, half: bool) -> ir.Value:
    """What a cache of 8 or 16 bits keeps of keys or values."""
    if half:
        return context.op("Cast", x, to=ir.DataType.FLOAT16)
    if scale is None:
        return x
    codes = context.op("Round", context.op("Div", x, scale))
    bounds = [context.const(bound, np.float32) for bound in (-128, 127)]
    return context.op("Cast", context.op("Clip", codes, *bounds), to=ir.DataType.INT8)


def _wide(context: Lowering, codes: ir.Value, scale: ir.Value | None, half: bool) -> ir.Value:
    if half:
        return context.op("Cast", codes, to=ir.DataType.FLOAT)
    return codes if scale is None else context.op("Mul", context.op("Cast", codes, to=ir.DataType.FLOAT), scale)
