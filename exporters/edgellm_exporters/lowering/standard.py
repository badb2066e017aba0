"""Canonical ops in standard ONNX only: the form that any runtime takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import recurrent
from edgellm_exporters.lowering.context import Lowering, Rule, blank, inputs_of, shape_of
from edgellm_exporters.lowering.window import by_attention, window_rule
from edgellm_exporters.quantize.plan import ROW, QuantizedWeight

__all__ = [
    "RULES",
    "is_shared",
    "matmul",
    "norm_heads",
    "row_scales_of",
    "scales_of",
    "signed_columns",
    "split_heads",
    "steps",
    "with_block_sums",
]

_TYPES: Mapping[tuple[int, bool], Any] = {
    (8, True): np.int8, (8, False): np.uint8, (4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4,
}  # fmt: skip


def embedding(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """Gather; of an 8-bit table, gather codes and scales and scale the few rows taken."""
    weight, indices = node.inputs
    assert weight is not None
    quantized = context.quantized(weight)
    if quantized is None:
        return [context.op("Gather", weight, indices)]
    if quantized.scheme.bits < 8 or quantized.scheme.shifted:  # Gather takes no 4-bit tensor
        return [context.op("Gather", _rows(context, weight), indices)]
    parts = [context.op("Gather", part, indices) for part in _parts(context, weight)]
    return [context.op("DequantizeLinear", *parts, axis=-1, block_size=quantized.scheme.block or quantized.shape[1])]


def linear(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """X W^T + b."""
    x, weight, bias = inputs_of(node, 3)
    assert x is not None and weight is not None
    return [matmul(context, x, weight, bias)]


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


def rms_norm(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """RMSNormalization over the last axis."""
    return [context.op("RMSNormalization", *node.inputs, axis=-1, epsilon=node.attributes["epsilon"].as_float())]


def take_positions(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """GatherND over rows."""
    hidden, positions = node.inputs
    indices = context.op("Unsqueeze", positions, context.const([2]))  # (batch, count, 1)
    return [context.op("GatherND", hidden, indices, batch_dims=1)]


def attention(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """Write the new keys and values into the cache, then attend under an explicit mask."""
    q, k, v, past_k, past_v, _, _, cos, sin, q_norm, k_norm = inputs_of(node, 11)
    heads = node.attributes["num_heads"].as_int()
    kv_heads = node.attributes["num_kv_heads"].as_int()
    q, k, v = (split_heads(context, x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = (norm_heads(context, node, x, weight) for x, weight in ((q, q_norm), (k, k_norm)))
    if cos is not None and sin is not None:
        q, k = (_rotate(context, x, cos, sin) for x in (q, k))
    present = [_write(context, past, new) for past, new in ((past_k, k), (past_v, v))]
    total = context.op("Unsqueeze", _total(context), context.const(0))  # (1,)
    visible = [context.op("Slice", x, context.const([0]), total, context.const([2])) for x in present]
    scale = node.attributes["scale"].as_float()
    y = context.op("Attention", q, *visible, _mask(context), scale=scale)  # (batch, heads, time, head_dim)
    merged = context.op("Transpose", y, perm=[0, 2, 1, 3])
    return [context.op("Reshape", merged, context.const([0, 0, -1])), *present]


def split_heads(context: Lowering, x: ir.Value | None, heads: int) -> ir.Value:
    """(batch, time, heads * head_dim) to (batch, heads, time, head_dim)."""
    split = context.op("Reshape", x, context.const([0, 0, heads, -1]))  # (batch, time, heads, head_dim)
    return context.op("Transpose", split, perm=[0, 2, 1, 3])


def norm_heads(context: Lowering, node: ir.Node, x: ir.Value, weight: ir.Value | None) -> ir.Value:
    """RMSNormalization of each head of x (batch, heads, time, head_dim) of an Attention; x itself without a weight."""
    if weight is None:
        return x
    return context.op("RMSNormalization", x, weight, axis=-1, epsilon=node.attributes["epsilon"].as_float())


def steps(context: Lowering) -> ir.Value:
    """0, 1, ... to the time of a step, (time,)."""

    def make() -> ir.Value:
        time = context.op("Shape", context.input("tokens"), start=1, end=2)
        return context.op("Range", context.const(0), context.op("Squeeze", time, context.const([0])), context.const(1))

    return context.once("steps", make)


def _positions(context: Lowering) -> ir.Value:
    """Each new token's position in its row, (batch, time)."""

    def make() -> ir.Value:
        past = context.op("Cast", context.input("past_lengths"), to=ir.DataType.INT64)
        return context.op("Add", context.op("Unsqueeze", past, context.const([1])), steps(context))

    return context.once("positions", make)


def _total(context: Lowering) -> ir.Value:
    """One past the last position that any row writes, a scalar."""
    return context.once(
        "total",
        lambda: context.op("Add", context.op("ReduceMax", _positions(context), keepdims=0), context.const(1)),
    )


def _mask(context: Lowering) -> ir.Value:
    """Which slots each new token sees, (batch, 1, time, total): those up to its own position."""

    def make() -> ir.Value:
        slots = context.op("Range", context.const(0), _total(context), context.const(1))
        last = context.op("Unsqueeze", _positions(context), context.const([1, 3]))
        return context.op("LessOrEqual", slots, last)

    return context.once("mask", make)


def _rotate(context: Lowering, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    def positions() -> ir.Value:  # padding may point past the table; its result is not used
        last = context.const(shape_of(cos)[0] - 1)
        return context.op("Min", _positions(context), last)

    clipped = context.once(("rotary positions", cos.name), positions)
    return context.op("RotaryEmbedding", x, cos, sin, clipped)


def _write(context: Lowering, past: ir.Value | None, new: ir.Value) -> ir.Value:
    index = context.once(
        "slots", lambda: context.op("Unsqueeze", _positions(context), context.const([1, 3]))
    )  # (batch, 1, time, 1)
    slots = context.op("Expand", index, context.op("Shape", new))
    return context.op("ScatterElements", past, slots, new, axis=2)


def _parts(context: Lowering, weight: ir.Value) -> list[ir.Value]:
    """What DequantizeLinear reads: codes, scales and, where they are not all the middle code, zeros."""
    quantized = context.quantized(weight)
    assert quantized is not None
    scheme, blocks = quantized.scheme, (quantized.shape[0], quantized.blocks)
    if scheme.bits not in (4, 8):
        raise LoweringError(
            f"{weight.name}: opset 23 has no {scheme.bits}-bit type; use 4 or 8 bits, or the cpu target"
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
    return any(user.op_type in ("Embedding", "Gather") for user, _ in weight.uses())


RULES: Mapping[str, Rule] = {
    "Attention": attention,
    "Embedding": embedding,
    "Linear": linear,
    "RMSNorm": rms_norm,
    "TakePositions": take_positions,
    "WindowAttention": window_rule(steps, by_attention),
    **recurrent.rules(matmul, hoist=_columns),
}
