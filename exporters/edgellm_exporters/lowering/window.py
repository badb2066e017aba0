"""Attention over a sliding window in standard ONNX: the one form that every target shares.

The ring is read whole, beside the new tokens, under a mask made of absolute positions; then what each slot holds after
the step is taken from both. Nothing is scattered, so that padding is written nowhere and a chunk may be longer than the
ring. Past and present are different memory: no library promises that a ring is read before it is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering.context import Lowering, Rule, shape_of

__all__ = [
    "HIDDEN",
    "Attend",
    "Heads",
    "attention_with",
    "by_attention",
    "by_masked_attention",
    "by_products",
    "products_with",
    "scaled_scores",
    "window_rule",
]

HIDDEN = -60000.0  # what the score of a key that may not be seen is lowered by; float16 holds it


@dataclass(frozen=True)
class Heads:
    """What an attention knows of its heads."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    sinks: ir.Value | None = None  # (heads,), scores that take part in the softmax and have no value


# From queries (batch, heads, time, head_dim), keys and values (batch, kv_heads, slots + time, head_dim) and what may be
# seen (batch, 1, time, slots + time), to the attended values, as the queries.
Attend = Callable[[Lowering, ir.Value, ir.Value, ir.Value, ir.Value, Heads], ir.Value]


def window_rule(steps: Callable[[Lowering], ir.Value], attend: Attend) -> Rule:
    """A target's rule for WindowAttention.

    Args:
        steps: gives 0, 1, ... to the time of a step, (time,) int64.
        attend: the target's softmax(QK^T) V under a mask.
    """

    def rule(context: Lowering, view: View) -> Sequence[ir.Value]:
        kv_heads, slots, head_dim = _sizes(view.past_k)
        view.ignore("num_kv_heads")  # the ring has as many
        heads = view.num_heads
        form = Heads(heads, kv_heads, head_dim, view.scale, view.softcap)
        parts = ((view.q, heads), (view.k, kv_heads), (view.v, kv_heads))
        q, k, v = (_split(context, x, count, head_dim) for x, count in parts)
        if view.q_norm is not None and view.k_norm is not None:
            q, k = (
                context.op("RMSNormalization", x, weight, axis=-1, epsilon=view.epsilon)
                for x, weight in ((q, view.q_norm), (k, view.k_norm))
            )
        at = _Positions(context, view.past_lengths, view.lengths, slots, steps)
        if view.cos is not None and view.sin is not None:
            q, k = (_rotate(context, x, view.cos, view.sin, at.new) for x in (q, k))
        keys, values = (context.op("Concat", *both, axis=2) for both in ((view.past_k, k), (view.past_v, v)))
        y = attend(context, q, keys, values, at.visible(view.window), form)
        merged = context.op("Transpose", y, perm=[0, 2, 1, 3])  # (batch, time, heads, head_dim)
        index = at.taken(kv_heads)
        present = [context.op("GatherND", both, index, batch_dims=2) for both in (keys, values)]
        return [context.op("Reshape", merged, context.const([0, 0, heads * head_dim])), *present]

    return rule


class _Positions:
    """Where tokens are in their rows, for one ring; what several layers share is made once.

    Args:
        context: of the lowering.
        past_lengths: (batch,) int32.
        lengths: (batch,) int32.
        slots: of the ring.
        steps: see :func:`window_rule`.
    """

    def __init__(
        self, context: Lowering, past_lengths: ir.Value, lengths: ir.Value, slots: int,
        steps: Callable[[Lowering], ir.Value],
    ) -> None:  # fmt: skip
        self._context, self._slots = context, slots
        self._key = (past_lengths, lengths, slots)
        self._past = self._once("past", lambda: self._column(past_lengths))  # (batch, 1)
        self._total = self._once("total", lambda: context.op("Add", self._past, self._column(lengths)))  # (batch, 1)
        self.new = self._once("new", lambda: context.op("Add", self._past, steps(context)))  # (batch, time)

    def _once(self, what: str, make: Callable[[], ir.Value]) -> ir.Value:
        return self._context.once(("ring", what, *self._key), make)

    def _column(self, lengths: ir.Value) -> ir.Value:
        wide = self._context.op("Cast", lengths, to=ir.DataType.INT64)
        return self._context.op("Unsqueeze", wide, self._context.const([1]))

    def _held(self, total: ir.Value) -> ir.Value:
        """Which token each slot holds when a row has so many, (batch, slots); negative where it holds none."""
        context, slots = self._context, self._slots
        # what is divided is never negative, for libraries differ in the remainder of that
        before = context.op("Add", total, context.const(slots - 1 - np.arange(slots)[None]))
        age = context.op("Mod", before, context.const(slots))
        return context.op("Sub", context.op("Sub", total, context.const(1)), age)

    def visible(self, window: int) -> ir.Value:
        """Which of the ring's tokens and the new ones each new one sees, (batch, 1, time, slots + time)."""

        def make() -> ir.Value:
            context = self._context
            seen = context.op("Concat", self._held(self._past), self.new, axis=1)
            there = context.op("GreaterOrEqual", seen, context.const(0))
            keys = context.op("Unsqueeze", seen, context.const([1, 2]))  # (batch, 1, 1, slots + time)
            distance = context.op("Sub", context.op("Unsqueeze", self.new, context.const([1, 3])), keys)
            near = context.op("Less", distance, context.const(window))
            before = context.op("And", near, context.op("GreaterOrEqual", distance, context.const(0)))
            return context.op("And", before, context.op("Unsqueeze", there, context.const([1, 2])))

        return self._once(f"visible {window}", make)

    def taken(self, kv_heads: int) -> ir.Value:
        """What each slot takes of the ring followed by the new tokens, (batch, kv_heads, slots, 1)."""

        def make() -> ir.Value:
            context, slots = self._context, self._slots
            fresh = context.op("Sub", self._held(self._total), self._past)  # which new token each slot holds, if any
            index = context.op(
                "Where", context.op("GreaterOrEqual", fresh, context.const(0)),
                context.op("Add", fresh, context.const(slots)), context.const(np.arange(slots)[None]),
            )  # fmt: skip
            return context.op(
                "Expand", context.op("Unsqueeze", index, context.const([1, 3])), context.const([1, kv_heads, 1, 1])
            )

        return self._once(f"taken {kv_heads}", make)


def by_attention(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value, form: Heads
) -> ir.Value:
    """ONNX's Attention under a mask of truth values; with a soft cap or sinks, products."""
    if (
        form.softcap or form.sinks is not None
    ):  # the kernel has no sinks, and caps one score after another: ten times the time over a filled cache
        return by_products(context, q, keys, values, visible, form)
    return context.op("Attention", q, keys, values, visible, scale=form.scale)


def by_masked_attention(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value, form: Heads
) -> ir.Value:
    """ONNX's Attention under a mask of addends, the one that TensorRT takes; it knows no soft cap and no sinks."""
    return attention_with(context, q, keys, values, _addends(context, visible), form)


def attention_with(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, addends: ir.Value, form: Heads
) -> ir.Value:
    """:func:`by_masked_attention` with the addends themselves, one for each key or for each head, query and key."""
    assert not form.softcap and form.sinks is None
    return context.op("Attention", q, keys, values, addends, scale=form.scale, is_causal=0)


def by_products(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value, form: Heads
) -> ir.Value:
    """Products and a softmax, for libraries without a kernel of Attention, or without one for such a graph."""
    return products_with(context, q, keys, values, _addends(context, visible), form)


def products_with(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, addends: ir.Value, form: Heads
) -> ir.Value:
    """:func:`by_products` with the addends themselves, (batch, 1 | kv_heads, 1 | time, keys)."""
    group = form.heads // form.kv_heads
    q = context.op("Reshape", q, context.const([0, form.kv_heads, group, -1, form.head_dim]))
    apart = context.const([2])
    turned = context.op("Unsqueeze", context.op("Transpose", keys, perm=[0, 1, 3, 2]), apart)
    scores = scaled_scores(context, context.op("MatMul", q, turned), form.scale, form.softcap)
    mask = context.once(("addends of groups", addends), lambda: context.op("Unsqueeze", addends, apart))
    seen = context.op("Add", scores, mask)  # (batch, kv_heads, group, time, keys)
    shares = _shares(context, seen, form)
    y = context.op("MatMul", shares, context.op("Unsqueeze", values, apart))
    return context.op("Reshape", y, context.const([0, form.heads, -1, form.head_dim]))


def _shares(context: Lowering, scores: ir.Value, form: Heads) -> ir.Value:
    """A softmax of scores (batch, kv_heads, group, time, keys), in which each head's sink takes its share."""
    if form.sinks is None:
        return context.op("Softmax", scores, axis=-1)
    sinks = context.op("Reshape", form.sinks, context.const([form.kv_heads, -1, 1, 1]))
    last = context.const([-1])
    highest = context.op("Max", context.op("ReduceMax", scores, last, keepdims=1), sinks)
    powers = context.op("Exp", context.op("Sub", scores, highest))
    beside = context.op("Exp", context.op("Sub", sinks, highest))
    return context.op("Div", powers, context.op("Add", context.op("ReduceSum", powers, last, keepdims=1), beside))


def scaled_scores(context: Lowering, products: ir.Value, scale: float, softcap: float) -> ir.Value:
    """Scores, bounded by a soft cap where there is one."""
    if not softcap:
        return context.op("Mul", products, context.const(scale, np.float32))
    bounded = context.op("Tanh", context.op("Mul", products, context.const(scale / softcap, np.float32)))
    return context.op("Mul", bounded, context.const(softcap, np.float32))


def _addends(context: Lowering, visible: ir.Value) -> ir.Value:
    """A mask that is added to scores."""

    def make() -> ir.Value:
        return context.op("Where", visible, context.const(0, np.float32), context.const(HIDDEN, np.float32))

    return context.once(("addends", visible), make)


def _split(context: Lowering, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """(batch, time, heads * head_dim) to (batch, heads, time, head_dim)."""
    split = context.op("Reshape", x, context.const([0, 0, heads, head_dim]))  # (batch, time, heads, head_dim)
    return context.op("Transpose", split, perm=[0, 2, 1, 3])


def _rotate(context: Lowering, x: ir.Value, cos: ir.Value, sin: ir.Value, positions: ir.Value) -> ir.Value:
    def clipped() -> ir.Value:  # padding may point past the table; its result is not used
        return context.op("Min", positions, context.const(shape_of(cos)[0] - 1))

    return context.op("RotaryEmbedding", x, cos, sin, context.once(("rotary", positions, cos.name), clipped))


def _sizes(ring: ir.Value) -> tuple[int, int, int]:
    """Heads, slots and features of a ring (batch, kv_heads, slots, head_dim)."""
    shape = [] if ring.shape is None else [size for size in ring.shape[1:] if isinstance(size, int)]
    if len(shape) != 3:
        raise LoweringError(
            f"{ring.name}: WindowAttention needs a ring whose heads, slots and features are whole numbers"
        )
    kv_heads, slots, head_dim = shape
    return kv_heads, slots, head_dim
