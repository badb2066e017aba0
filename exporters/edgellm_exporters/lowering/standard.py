"""Canonical ops in standard ONNX only: the form that any runtime takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View, view_of
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import recurrent
from edgellm_exporters.lowering.context import Lowering, Rule, blank, shape_of
from edgellm_exporters.lowering.expert import expert_rule
from edgellm_exporters.lowering.three_bits import apart
from edgellm_exporters.lowering.window import HIDDEN, Attend, Heads, by_attention, window_rule
from edgellm_exporters.quantize.plan import ROW, QuantizedWeight

__all__ = [
    "RULES",
    "attention_rule",
    "head_dim_of",
    "heads_of",
    "is_shared",
    "matmul",
    "merged",
    "row_scales_of",
    "scales_of",
    "signed_columns",
    "steps",
    "visible_slots",
    "with_block_sums",
]

_TYPES: Mapping[tuple[int, bool], Any] = {
    (8, True): np.int8, (8, False): np.uint8, (4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4,
}  # fmt: skip


def embedding(context: Lowering, view: View) -> Sequence[ir.Value]:
    """Gather; of an 8-bit table, gather codes and scales and scale the few rows taken."""
    weight, indices = view.weight, view.indices
    quantized = context.quantized(weight)
    if quantized is None:
        return [context.op("Gather", weight, indices)]
    if quantized.scheme.bits < 8 or quantized.scheme.shifted:  # Gather takes no 4-bit tensor
        return [context.op("Gather", _rows(context, weight), indices)]
    parts = [context.op("Gather", part, indices) for part in _parts(context, weight)]
    return [context.op("DequantizeLinear", *parts, axis=-1, block_size=quantized.scheme.block or quantized.shape[1])]


def linear(context: Lowering, view: View) -> Sequence[ir.Value]:
    """X W^T + b."""
    return [matmul(context, view.x, view.weight, view.bias)]


def matmul(context: Lowering, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """X W^T + b, W as a float or as codes and scales."""
    y = context.op("MatMul", x, _columns(context, weight))
    return y if bias is None else context.op("Add", y, bias)


def _columns(context: Lowering, weight: ir.Value) -> ir.Value:
    """W^T, (columns, rows), in float."""
    quantized = context.quantized(weight)
    if quantized is None and not is_shared(weight):
        return context.derived(weight, "transposed", np.transpose, blank(weight, shape_of(weight)[::-1]))

    return context.once(("columns", weight.name), lambda: context.op("Transpose", _rows(context, weight), perm=[1, 0]))


def _rows(context: Lowering, weight: ir.Value) -> ir.Value:
    """W, (rows, columns), in float; a tied table is stored once, as the embedding reads it."""
    quantized = context.quantized(weight)
    if quantized is None:
        return weight
    return context.once(("rows", weight.name), lambda: _dequantized(context, weight, quantized))


def _dequantized(context: Lowering, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    (rows, columns), block = quantized.shape, quantized.scheme.block
    if block == ROW:
        codes, _ = _parts(context, weight)
        return context.op("DequantizeLinear", codes, row_scales_of(context, weight), axis=0)
    wide = context.op("DequantizeLinear", *_parts(context, weight), axis=1, block_size=block)
    if not quantized.scheme.shifted:
        return wide
    blocks = columns // block
    sizes = context.const([columns, blocks, quantized.padded - columns - blocks])
    plain, shifts, _ = context.ops(3, "Split", wide, sizes, axis=1)
    spread = context.op("Reshape", plain, context.const([rows, blocks, block]))
    whole = context.op("Add", spread, context.op("Unsqueeze", shifts, context.const([2])))
    return context.op("Reshape", whole, context.const([rows, columns]))


def with_block_sums(context: Lowering, x: ir.Value, columns: int, block: int) -> ir.Value:
    """X followed by the sum of each of its blocks, (..., columns + columns / block)."""

    def make() -> ir.Value:
        outer = [0] * (len(x.shape) - 1 if x.shape is not None else 2)
        blocks = context.op("Reshape", x, context.const([*outer, columns // block, block]))
        return context.op("Concat", x, context.op("ReduceSum", blocks, context.const([-1]), keepdims=0), axis=-1)

    return context.once(("block sums", x, block), make)


def rms_norm(context: Lowering, view: View) -> Sequence[ir.Value]:
    """RMSNormalization over the last axis."""
    return [context.op("RMSNormalization", view.x, view.weight, axis=-1, epsilon=view.epsilon)]


def take_positions(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GatherND over rows."""
    indices = context.op("Unsqueeze", view.positions, context.const([2]))  # (batch, count, 1)
    return [context.op("GatherND", view.hidden, indices, batch_dims=1)]


def attention_rule(attend: Attend) -> Rule:
    """A target's rule for Attention without a kernel that writes the cache.

    Args:
        attend: the target's softmax(QK^T) V under a mask.
    """
    return lambda context, view: _attention(context, view, attend)


def _attention(context: Lowering, view: View, attend: Attend) -> Sequence[ir.Value]:
    """Write the new keys and values into the cache, then attend under an explicit mask."""
    view.ignore("lengths")  # padding comes after all valid tokens, and so is seen by none of them
    past = view.past_lengths
    q, k, v = heads_of(context, view)
    if view.cos is not None and view.sin is not None:
        q, k = (_rotate(context, x, past, view.cos, view.sin) for x in (q, k))
    present = [_write(context, cache, past, new) for cache, new in ((view.past_k, k), (view.past_v, v))]
    total = context.op("Unsqueeze", _total(context, past), context.const(0))  # (1,)
    visible = [context.op("Slice", x, context.const([0]), total, context.const([2])) for x in present]
    mask = _mask(context, past, view.window)
    form = Heads(view.num_heads, view.num_kv_heads, head_dim_of(view), view.scale, view.softcap, view.sinks)
    if view.distances is None:
        y = attend(context, q, visible[0], visible[1], mask, form)  # (batch, heads, time, head_dim)
    else:
        y = _attend_by_distance(context, q, visible, mask, view)
    return [merged(context, y), *present]


def merged(context: Lowering, y: ir.Value) -> ir.Value:
    """(batch, heads, time, head_dim) to (batch, time, heads * head_dim)."""
    return context.op("Reshape", context.op("Transpose", y, perm=[0, 2, 1, 3]), context.const([0, 0, -1]))


def _attend_by_distance(
    context: Lowering, q: ir.Value, kept: Sequence[ir.Value], mask: ir.Value, view: View
) -> ir.Value:
    """ONNX's Attention with a bias by distance; what may not be seen is in the bias, which layers share."""
    if view.softcap or view.sinks is not None:
        raise LoweringError("Attention with a bias by distance has no form with a soft cap or sinks; leave one out")

    def make() -> ir.Value:
        past, table = view.past_lengths, view.distances
        slots = context.op("Range", context.const(0), _total(context, past), context.const(1))
        back = context.op("Sub", context.op("Squeeze", _slots(context, past), context.const([1])), slots)
        last = context.op("Sub", context.op("Shape", table, start=0, end=1), context.const([1]))
        rows = context.op("Gather", table, context.op("Min", context.op("Max", back, context.const([0])), last))
        bias = context.op("Transpose", rows, perm=[0, 3, 1, 2])  # (batch, heads, time, total)
        return context.op("Where", mask, bias, context.const(HIDDEN, np.float32))

    bias = context.once(("bias by distance", view.past_lengths, view.distances, mask), make)
    return context.op("Attention", q, *kept, bias, scale=view.scale)


def source_attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """ONNX's Attention under a mask of the sources' lengths, and a bias where there is one."""
    q, time = view.q, view.q if view.q.shape is None else str(view.q.shape[2])  # layers of one time share masks

    def seen() -> ir.Value:  # ONNX Runtime's kernel wants a row for each query
        row = context.op("Unsqueeze", view.mask, context.const([1, 2]))  # (batch, 1, 1, source)
        one = context.const([1])
        size = context.op("Concat", one, one, context.op("Shape", q, start=2, end=3), one, axis=0)
        return context.op("Expand", row, size)  # (batch, 1, time, source)

    mask = context.once(("source mask", view.mask, time), seen)
    if view.bias is not None:
        mask = context.once(
            ("biased", mask, view.bias),
            lambda: context.op("Where", mask, view.bias, context.const(HIDDEN, np.float32)),
        )
    return [merged(context, context.op("Attention", q, view.k, view.v, mask, scale=view.scale))]


def head_dim_of(view: View) -> int:
    """How many features each head of an Attention has.

    Raises:
        LoweringError: its cache does not say.
    """
    size = None if view.past_k.shape is None else view.past_k.shape[-1]
    if not isinstance(size, int):
        raise LoweringError(f"{view.past_k.name}: Attention needs a cache whose last size is a whole number")
    return size


def heads_of(
    context: Lowering, view: View, parts: Sequence[ir.Value] = ()
) -> tuple[ir.Value, ir.Value, ir.Value]:  # fmt: skip
    """Queries, keys and values of an Attention, (batch, heads, time, head_dim) each, normed but not yet rotated.

    Args:
        context: of the lowering.
        view: the node.
        parts: in the place of its q, k and v; empty for these.
    """
    counts = (view.num_heads, view.num_kv_heads, view.num_kv_heads)
    q, k, v = (_split_heads(context, x, n) for x, n in zip(parts or (view.q, view.k, view.v), counts, strict=True))
    if view.q_norm is None or view.k_norm is None:
        return q, k, v
    return _norm_heads(context, q, view.q_norm, view.epsilon), _norm_heads(context, k, view.k_norm, view.epsilon), v


def _split_heads(context: Lowering, x: ir.Value, heads: int) -> ir.Value:
    """(batch, time, heads * head_dim) to (batch, heads, time, head_dim)."""
    split = context.op("Reshape", x, context.const([0, 0, heads, -1]))  # (batch, time, heads, head_dim)
    return context.op("Transpose", split, perm=[0, 2, 1, 3])


def _norm_heads(context: Lowering, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """RMSNormalization of each head of x (batch, heads, time, head_dim)."""
    return context.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)


def steps(context: Lowering) -> ir.Value:
    """0, 1, ... to the time of a step, (time,)."""

    def make() -> ir.Value:
        time = context.time()
        return context.op("Range", context.const(0), context.op("Squeeze", time, context.const([0])), context.const(1))

    return context.once("steps", make)


def _positions(context: Lowering, past_lengths: ir.Value) -> ir.Value:
    """Each new token's position in its row, (batch, time)."""

    def make() -> ir.Value:
        past = context.op("Cast", past_lengths, to=ir.DataType.INT64)
        return context.op("Add", context.op("Unsqueeze", past, context.const([1])), steps(context))

    return context.once(("positions", past_lengths), make)


def _slots(context: Lowering, past_lengths: ir.Value) -> ir.Value:
    """The slot that each new token is written to, (batch, 1, time, 1)."""
    return context.once(
        ("slots", past_lengths),
        lambda: context.op("Unsqueeze", _positions(context, past_lengths), context.const([1, 3])),
    )


def _total(context: Lowering, past_lengths: ir.Value) -> ir.Value:
    """One past the last position that any row writes, a scalar."""

    def make() -> ir.Value:
        return context.op(
            "Add", context.op("ReduceMax", _positions(context, past_lengths), keepdims=0), context.const(1)
        )

    return context.once(("total", past_lengths), make)


def _mask(context: Lowering, past_lengths: ir.Value, window: int) -> ir.Value:
    """Which slots each new token sees, (batch, 1, time, total): those up to its own position, in its window."""

    def make() -> ir.Value:
        slots = context.op("Range", context.const(0), _total(context, past_lengths), context.const(1))
        return visible_slots(context, slots, _slots(context, past_lengths), window)

    return context.once(("mask", past_lengths, window), make)


def visible_slots(context: Lowering, slots: ir.Value, own: ir.Value, window: int) -> ir.Value:
    """Whether each slot is up to a token's own and, with a window, one of the last ``window`` that are."""
    visible = context.op("LessOrEqual", slots, own)
    if not window:
        return visible
    first = context.op("Sub", own, context.const(window))
    return context.op("And", visible, context.op("Greater", slots, first))


def _rotate(context: Lowering, x: ir.Value, past_lengths: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    def positions() -> ir.Value:  # padding may point past the table; its result is not used
        last = context.const(shape_of(cos)[0] - 1)
        return context.op("Min", _positions(context, past_lengths), last)

    clipped = context.once(("rotary positions", past_lengths, cos.name), positions)
    return context.op("RotaryEmbedding", x, cos, sin, clipped)


def _write(context: Lowering, cache: ir.Value, past_lengths: ir.Value, new: ir.Value) -> ir.Value:
    slots = context.op("Expand", _slots(context, past_lengths), context.op("Shape", new))
    return context.op("ScatterElements", cache, slots, new, axis=2)


def _parts(context: Lowering, weight: ir.Value) -> list[ir.Value]:
    """What DequantizeLinear reads: codes, scales and, where they are not all the middle code, zeros."""
    quantized = context.quantized(weight)
    assert quantized is not None
    scheme, blocks = quantized.scheme, (quantized.shape[0], quantized.blocks)
    if scheme.bits == 3:
        return [apart(context, weight, quantized), scales_of(context, weight), _wide_zeros(context, weight, quantized)]
    if scheme.bits not in (4, 8):
        raise LoweringError(
            f"{weight.name}: opset 23 has no {scheme.bits}-bit type; use 3, 4 or 8 bits, or the cpu target"
        )
    dtype = _TYPES[scheme.bits, scheme.symmetric]
    shift = scheme.middle if scheme.symmetric else 0
    codes = quantized.lazy(
        lambda c: (c.codes.astype(np.int16) - shift).astype(dtype),
        np.broadcast_to(np.zeros((), dtype), (quantized.shape[0], quantized.padded)),
    )
    parts = [context.part(weight, "codes", codes), scales_of(context, weight)]
    if not scheme.symmetric:
        zeros = quantized.lazy(lambda c: c.zeros.astype(dtype), np.broadcast_to(np.zeros((), dtype), blocks))
        parts.append(context.part(weight, "zeros", zeros))
    return parts


def _wide_zeros(context: Lowering, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """The zeros of 3-bit codes, a byte each as these are; 4 bits in the file."""
    four = ml_dtypes.uint4
    like = np.broadcast_to(np.zeros((), four), (quantized.shape[0], quantized.blocks))
    zeros = context.part(weight, "zeros", quantized.lazy(lambda c: c.zeros.astype(four), like))
    return context.once(("zeros", weight.name), lambda: context.op("Cast", zeros, to=ir.DataType.UINT8))


def signed_columns(
    context: Lowering, weight: ir.Value, input_scale: ir.Value, input_zero: ir.Value
) -> tuple[ir.Value, ...]:
    """What an integer product reads beside its input, for a weight with one scale a row.

    Returns:
        Codes (columns, rows) int8, the input's scale, the weight's scales (rows,), the input's zero.
    """
    quantized = context.quantized(weight)
    assert quantized is not None
    middle = quantized.scheme.middle
    codes = quantized.lazy(
        lambda c: (c.codes.astype(np.int16) - middle).astype(np.int8).T,
        np.broadcast_to(np.int8(0), quantized.shape[::-1]),
    )
    return context.part(weight, "columns", codes), input_scale, row_scales_of(context, weight), input_zero


def row_scales_of(context: Lowering, weight: ir.Value) -> ir.Value:
    """The scales (rows,) of a weight with one a row."""
    return context.once(
        ("row scales", weight.name), lambda: context.op("Squeeze", scales_of(context, weight), context.const([1]))
    )


def scales_of(context: Lowering, weight: ir.Value) -> ir.Value:
    """A quantized weight's scales, (rows, blocks): 16 bits in the file, widened when the graph is loaded."""
    quantized = context.quantized(weight)
    assert quantized is not None
    like = np.broadcast_to(np.float16(0), (quantized.shape[0], quantized.blocks))
    stored = context.part(weight, "scales", quantized.lazy(lambda c: c.scales.astype(np.float16), like))
    return context.once(("scales", weight.name), lambda: context.op("Cast", stored, to=ir.DataType.FLOAT))


def is_shared(weight: ir.Value) -> bool:
    """Whether rows of a weight are looked up, so that it is stored by rows."""
    return any(user.op_type == "Gather" or _looks_up(user, weight) for user, _ in weight.uses())


def _looks_up(node: ir.Node, weight: ir.Value) -> bool:
    view = view_of(node)
    return view is not None and any(table is weight for table in view.all(view.op.tables))


RULES: Mapping[str, Rule] = {
    "Attention": attention_rule(by_attention),
    "Embedding": embedding,
    "Expert": expert_rule(matmul),
    "Linear": linear,
    "RMSNorm": rms_norm,
    "SourceAttention": source_attention,
    "TakePositions": take_positions,
    "WindowAttention": window_rule(steps, by_attention),
    **recurrent.rules(matmul, hoist=_columns),
}
