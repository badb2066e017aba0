"""Canonical ops in the standard ONNX that TensorRT's parser takes without plugins, in graphs of fixed sizes.

Every form was chosen because an engine of it builds and ONNX Runtime computes the same file; docs/tensorrt.md lists the
forms that do not. What the parser would take and compute otherwise is refused by :mod:`edgellm_exporters.engines.lint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.context import Array, Lowering, Rule, blank, shape_of
from edgellm_exporters.lowering.fixed_form import DECODE
from edgellm_exporters.lowering.linears import linear_rule
from edgellm_exporters.lowering.scan import CELLS
from edgellm_exporters.lowering.tensorrt_recurrent import rules
from edgellm_exporters.lowering.window import (
    HIDDEN,
    Heads,
    attention_with,
    by_masked_attention,
    by_products,
    products_with,
    scaled_scores,
    window_rule,
)
from edgellm_exporters.quantize.plan import ROW, Codes, QuantizedWeight

__all__ = ["OPSET", "RULES", "matmul"]

OPSET = 24  # TensorScatter


def embedding(context: Lowering, view: View) -> Sequence[ir.Value]:
    """Gather; of a quantized table, from what DequantizeLinear makes of it, which engines fuse."""
    _tied(context, view.weight)  # asked while the lookup is still there to be seen
    return [context.op("Gather", _rows(context, view.weight), view.indices)]


def matmul(context: Lowering, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """X W^T + b, W as a float or as codes and scales; X rounded where the plan says to what."""
    y = context.op("MatMul", _rounded(context, x, weight), _columns(context, weight))
    return y if bias is None else context.op("Add", y, bias)


def _rounded(context: Lowering, x: ir.Value, weight: ir.Value) -> ir.Value:
    """X through QuantizeLinear and DequantizeLinear, one scale for all of it."""
    scale = context.plan.inputs.get(str(weight.name))
    quantized = context.quantized(weight)
    if scale is None or quantized is None:
        return x

    def make() -> ir.Value:
        kind = ml_dtypes.float8_e4m3fn if quantized.scheme.floating else np.int8
        each, zero = context.const(scale, np.float32), context.const(0, kind)
        return context.op("DequantizeLinear", context.op("QuantizeLinear", x, each, zero), each, zero)

    return context.once(("rounded", x, float(scale)), make)


def _tied(context: Lowering, weight: ir.Value) -> bool:
    """Whether rows of a weight are looked up too; it is then stored once, by rows."""
    return context.once(("tied", weight.name), lambda: standard.is_shared(weight))


def _columns(context: Lowering, weight: ir.Value) -> ir.Value:
    """W^T, (columns, rows), in float."""
    quantized = context.quantized(weight)
    if _tied(context, weight):
        rows = _rows(context, weight)
        return context.once(("columns", weight.name), lambda: context.op("Transpose", rows, perm=[1, 0]))
    if quantized is None:
        return context.derived(weight, "transposed", np.transpose, blank(weight, shape_of(weight)[::-1]))
    return context.once(("columns", weight.name), lambda: _dequantized(context, weight, quantized, turned=True))


def _rows(context: Lowering, weight: ir.Value) -> ir.Value:
    """W, (rows, columns), in float."""
    quantized = context.quantized(weight)
    if quantized is None:
        return weight
    return context.once(("rows", weight.name), lambda: _dequantized(context, weight, quantized, turned=False))


def _dequantized(context: Lowering, weight: ir.Value, quantized: QuantizedWeight, *, turned: bool) -> ir.Value:
    """Codes times scales; ``turned`` as W^T, in which products read them."""
    scheme, shape = quantized.scheme, quantized.shape
    four = scheme.bits == 4 and scheme.positive and scheme.block in (16, 32, 64, 128)
    eight = scheme.bits == 8 and scheme.block == ROW
    if not scheme.symmetric or not (four or eight):
        raise LoweringError(
            f"{weight.name}: TensorRT has no form of {scheme} weights; it takes symmetric 4-bit weights in blocks of "
            "16 to 128 and 8-bit weights with one scale a row (8:row)"
        )
    kind = ml_dtypes.float8_e4m3fn if scheme.floating else np.int8 if scheme.bits == 8 else ml_dtypes.int4

    def codes(found: Codes) -> Array:
        signed = found.signed(kind)
        return signed.T if turned else signed

    suffix = "columns" if turned else "rows"
    like = np.broadcast_to(np.zeros((), kind), shape[::-1] if turned else shape)
    stored = context.part(weight, f"{suffix}.codes", quantized.lazy(codes, like))
    if scheme.block == ROW:
        scales = quantized.lazy(lambda c: c.scales[:, 0], np.broadcast_to(np.float32(0), shape[:1]))
        return context.op(
            "DequantizeLinear", stored, context.part(weight, "scales", scales), axis=int(turned)
        )  # fmt: skip
    blocks = (shape[0], quantized.blocks)
    scales = quantized.lazy(
        lambda c: c.scales.T if turned else c.scales,
        np.broadcast_to(np.float32(0), blocks[::-1] if turned else blocks),
    )
    part = context.part(weight, f"{suffix}.scales", scales)
    return context.op("DequantizeLinear", stored, part, axis=int(not turned), block_size=scheme.block)


def take_positions(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GatherND over rows; of the one position that a decoding step has, all."""
    if context.fixed.role == DECODE:
        view.ignore("positions")  # there is no other than 0
        return [context.op("Identity", view.hidden)]
    return standard.RULES["TakePositions"](context, view)


def attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """Write the new keys and values into the cache in place, then attend to all its slots under a mask of addends."""
    view.ignore("lengths")  # padding comes after all valid tokens, and so is seen by none of them
    past = view.past_lengths
    q, k, v = standard.heads_of(context, view)
    if view.cos is not None and view.sin is not None:
        q, k = (_rotate(context, x, past, view.cos, view.sin) for x in (q, k))
    start = context.once(("start", past), lambda: context.op("Cast", past, to=ir.DataType.INT64))  # (batch,)
    present = [
        context.op("TensorScatter", cache, new, start, axis=2, mode="linear")
        for cache, new in ((view.past_k, k), (view.past_v, v))
    ]  # fmt: skip
    mask = _mask(context, past, view.window) if view.distances is None else _by_distance(context, view)
    if view.softcap or _loops(context):  # the parser takes no soft cap
        y = _written_out(context, view, q, present, mask)
    else:
        y = context.op("Attention", q, *present, mask, scale=view.scale, is_causal=0)
    merged = context.op("Transpose", y, perm=[0, 2, 1, 3])  # (batch, time, heads, head_dim)
    return [context.op("Reshape", merged, context.const([0, 0, -1])), *present]


def _loops(context: Lowering) -> bool:
    """Whether the graph has, or will have, a loop: an engine with both a loop and an Attention does not build."""
    kinds = {*(() if context.fixed.role == DECODE else CELLS), "Loop", "Scan"}
    return context.once("loops", lambda: any(node.op_type in kinds for node in context.graph))


def _written_out(
    context: Lowering, view: View, q: ir.Value, cache: Sequence[ir.Value], mask: ir.Value
) -> ir.Value:  # fmt: skip
    """Attention as products and a softmax; the queries of one key head become one longer query."""
    kv_heads, slots, head_dim = (size for size in view.past_k.shape[1:] if isinstance(size, int))
    keys, values = cache
    time, group = context.fixed.time, view.num_heads // kv_heads
    together = context.op("Reshape", q, context.const([0, kv_heads, group * time, head_dim]))
    scores = context.op("MatMul", together, context.op("Transpose", keys, perm=[0, 1, 3, 2]))
    apart = context.op("Reshape", scores, context.const([0, kv_heads * group, time, slots]))
    scores = scaled_scores(context, apart, view.scale, view.softcap)
    seen = context.op("Add", scores, mask)
    shares = context.op(
        "Reshape", context.op("Softmax", seen, axis=-1), context.const([0, kv_heads, group * time, slots])
    )
    y = context.op("MatMul", shares, values)
    return context.op("Reshape", y, context.const([0, kv_heads * group, time, head_dim]))


def _attend(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value, form: Heads
) -> ir.Value:
    written_out = form.softcap or _loops(context)  # the parser takes no soft cap
    return (by_products if written_out else by_masked_attention)(context, q, keys, values, visible, form)


def source_attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """Attention under a mask of addends, a bias among them where there is one; in a graph with a loop, products."""
    heads, head_dim = (size for size in (view.q.shape[1], view.q.shape[3]) if isinstance(size, int))
    form = Heads(heads=heads, kv_heads=view.k.shape[1], head_dim=head_dim, scale=view.scale, softcap=0.0)
    attend = products_with if _loops(context) else attention_with
    if view.bias is not None and attend is products_with and form.heads != form.kv_heads:
        raise LoweringError(
            f"SourceAttention with a bias and {form.heads} heads over {form.kv_heads} has no form in a graph with a "
            "loop; give each head keys of its own"
        )
    mask = _source_mask(context, view)
    return [standard.merged(context, attend(context, view.q, view.k, view.v, mask, form))]


def _source_mask(context: Lowering, view: View) -> ir.Value:
    """What is added to the score of each token of the source, (batch, 1 | heads, time, source)."""
    q, time = view.q, str(view.q.shape[2])  # layers of one time share it

    def make() -> ir.Value:
        there = context.op("Unsqueeze", view.mask, context.const([1, 2]))  # (batch, 1, 1, source)
        seen = context.const(0, np.float32) if view.bias is None else view.bias
        addends = context.op("Where", there, seen, context.const(HIDDEN, np.float32))
        one = context.const([1])
        rows = context.op("Concat", one, one, context.op("Shape", q, start=2, end=3), one, axis=0)
        return context.op("Expand", addends, rows)  # ONNX Runtime's kernel wants a row for each query

    return context.once(("source addends", view.mask, view.bias, time), make)


def _steps(context: Lowering) -> ir.Value:
    return context.const(np.arange(context.fixed.time))


def _positions(context: Lowering, past_lengths: ir.Value) -> ir.Value:
    """Each new token's position in its row, (batch, time)."""

    def make() -> ir.Value:
        past = context.op("Cast", past_lengths, to=ir.DataType.INT64)
        return context.op("Add", context.op("Unsqueeze", past, context.const([1])), _steps(context))

    return context.once(("positions", past_lengths), make)


def _mask(context: Lowering, past_lengths: ir.Value, window: int) -> ir.Value:
    """What is added to the score of each slot for each new token, (batch, 1, time, capacity)."""

    def make() -> ir.Value:
        slots = context.const(np.arange(context.fixed.capacity)[None, None, None])
        last = context.op("Unsqueeze", _positions(context, past_lengths), context.const([1, 3]))
        seen, hidden = context.const(0, np.float32), context.const(HIDDEN, np.float32)
        return context.op("Where", standard.visible_slots(context, slots, last, window), seen, hidden)

    return context.once(("mask", past_lengths, window), make)


def _by_distance(context: Lowering, view: View) -> ir.Value:
    """:func:`_mask` with what is added to the score of each key so many positions back, (batch, heads, time, slots)."""

    def make() -> ir.Value:
        slots = context.const(np.arange(context.fixed.capacity)[None, None])
        last = context.op("Unsqueeze", _positions(context, view.past_lengths), context.const([2]))
        back = context.op("Max", context.op("Sub", last, slots), context.const(0))  # (batch, time, slots)
        furthest = context.op("Sub", context.op("Shape", view.distances, start=0, end=1), context.const([1]))
        rows = context.op("Gather", view.distances, context.op("Min", back, furthest))
        bias = context.op("Transpose", rows, perm=[0, 3, 1, 2])
        return context.op("Add", bias, _mask(context, view.past_lengths, view.window))

    return context.once(("distances", view.past_lengths, view.distances, view.window), make)


def _rotate(context: Lowering, x: ir.Value, past_lengths: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    def positions() -> ir.Value:  # padding may point past the table; its result is not used
        return context.op("Min", _positions(context, past_lengths), context.const(shape_of(cos)[0] - 1))

    clipped = context.once(("rotary positions", past_lengths, cos.name), positions)
    return context.op("RotaryEmbedding", x, cos, sin, clipped)


RULES: Mapping[str, Rule] = {
    **{name: rule for name, rule in standard.RULES.items() if name != "Expert"},
    "Attention": attention,
    "Embedding": embedding,
    "Linear": linear_rule(matmul),
    "SourceAttention": source_attention,
    "TakePositions": take_positions,
    "WindowAttention": window_rule(_steps, _attend),
    **rules(matmul, hoist=_columns),
}
