"""Canonical ops in standard ONNX only: the form that any runtime takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgellm_exporters.lowering import recurrent
from edgellm_exporters.lowering.context import Lowering, Rule, blank, inputs_of, shape_of

__all__ = ["RULES"]


def embedding(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """Gather; of a quantized table, gather codes and scales and scale the few rows taken."""
    weight, indices = node.inputs
    assert weight is not None
    quantized = context.quantized(weight)
    if quantized is None:
        return [context.op("Gather", weight, indices)]
    codes, scales = _parts(context, weight)
    rows = context.op("Gather", codes, indices), context.op("Gather", scales, indices)
    return [context.op("DequantizeLinear", *rows, axis=-1, block_size=quantized.scheme.block)]


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
    if quantized is None and not _shared(weight):
        return context.derived(weight, "transposed", np.transpose, blank(weight, shape_of(weight)[::-1]))

    def make() -> ir.Value:
        stored = weight  # a tied table is stored once, as the embedding reads it
        if quantized is not None:
            stored = context.op("DequantizeLinear", *_parts(context, weight), axis=1, block_size=quantized.scheme.block)
        return context.op("Transpose", stored, perm=[1, 0])

    return context.once(("columns", weight.name), make)


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
    q, k, v, past_k, past_v, _, _, cos, sin = inputs_of(node, 9)
    heads = node.attributes["num_heads"].as_int()
    kv_heads = node.attributes["num_kv_heads"].as_int()
    q, k, v = (_split_heads(context, x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if cos is not None and sin is not None:
        q, k = (_rotate(context, x, cos, sin) for x in (q, k))
    present = [_write(context, past, new) for past, new in ((past_k, k), (past_v, v))]
    total = context.op("Unsqueeze", _total(context), context.const(0))  # (1,)
    visible = [context.op("Slice", x, context.const([0]), total, context.const([2])) for x in present]
    scale = node.attributes["scale"].as_float()
    y = context.op("Attention", q, *visible, _mask(context), scale=scale)  # (batch, heads, time, head_dim)
    merged = context.op("Transpose", y, perm=[0, 2, 1, 3])
    return [context.op("Reshape", merged, context.const([0, 0, -1])), *present]


def _split_heads(context: Lowering, x: ir.Value | None, heads: int) -> ir.Value:
    split = context.op("Reshape", x, context.const([0, 0, heads, -1]))  # (batch, time, heads, head_dim)
    return context.op("Transpose", split, perm=[0, 2, 1, 3])


def _positions(context: Lowering) -> ir.Value:
    """Each new token's position in its row, (batch, time)."""

    def make() -> ir.Value:
        past = context.op("Cast", context.input("past_lengths"), to=ir.DataType.INT64)
        time = context.op("Shape", context.input("tokens"), start=1, end=2)
        steps = context.op("Range", context.const(0), context.op("Squeeze", time, context.const([0])), context.const(1))
        return context.op("Add", context.op("Unsqueeze", past, context.const([1])), steps)

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


def _parts(context: Lowering, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    quantized = context.quantized(weight)
    assert quantized is not None
    rows, columns = quantized.shape
    codes = quantized.lazy(lambda c: c.codes, np.broadcast_to(np.int8(0), (rows, columns)))
    scales = quantized.lazy(
        lambda c: c.scales, np.broadcast_to(np.float32(0), (rows, columns // quantized.scheme.block))
    )
    return context.part(weight, "codes", codes), context.part(weight, "scales", scales)


def _shared(weight: ir.Value) -> bool:
    return any(user.op_type in ("Embedding", "Gather") for user, _ in weight.uses())


RULES: Mapping[str, Rule] = {
    "Attention": attention,
    "Embedding": embedding,
    "Linear": linear,
    "RMSNorm": rms_norm,
    "TakePositions": take_positions,
    **recurrent.rules(matmul, hoist=_columns),
}
