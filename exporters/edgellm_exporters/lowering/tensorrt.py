"""Canonical ops in the standard ONNX that TensorRT's parser takes without plugins, in graphs of fixed sizes.

Every form was chosen because an engine of it builds and ONNX Runtime computes the same file; docs/tensorrt.md lists the
forms that do not. What the parser would take and compute otherwise is refused by :mod:`edgellm_exporters.engines.lint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.context import Array, Lowering, Rule, blank, inputs_of, shape_of
from edgellm_exporters.lowering.fixed_form import DECODE, PREFILL
from edgellm_exporters.lowering.linears import linear_rule
from edgellm_exporters.lowering.scan import CELLS
from edgellm_exporters.lowering.tensorrt_recurrent import rules
from edgellm_exporters.lowering.window import Heads, by_masked_attention, by_products, window_rule
from edgellm_exporters.quantize.plan import ROW, Codes, QuantizedWeight

__all__ = ["OPSET", "RULES", "matmul"]

OPSET = 24  # TensorScatter
_HIDDEN = -60000.0  # what a score of a slot that may not be seen is lowered by; float16 holds it


def embedding(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """Gather; of a quantized table, from what DequantizeLinear makes of it, which engines fuse."""
    weight, indices = node.inputs
    assert weight is not None
    _tied(context, weight)  # asked while the lookup is still there to be seen
    return [context.op("Gather", _rows(context, weight), indices)]


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


def take_positions(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """GatherND over rows; of the one position that a decoding step has, all."""
    if context.fixed.role == DECODE:
        hidden = node.inputs[0]
        assert hidden is not None
        return [context.op("Identity", hidden)]
    return standard.RULES["TakePositions"](context, node)


def attention(context: Lowering, node: ir.Node) -> Sequence[ir.Value]:
    """Write the new keys and values into the cache in place, then attend to all its slots under a mask of addends."""
    q, k, v, past_k, past_v, past_lengths, _, cos, sin, q_norm, k_norm = inputs_of(node, 11)
    heads = node.attributes["num_heads"].as_int()
    kv_heads = node.attributes["num_kv_heads"].as_int()
    q, k, v = (standard.split_heads(context, x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q, k = (standard.norm_heads(context, node, x, weight) for x, weight in ((q, q_norm), (k, k_norm)))
    if cos is not None and sin is not None:
        q, k = (_rotate(context, x, cos, sin) for x in (q, k))
    start = context.once("start", lambda: context.op("Cast", past_lengths, to=ir.DataType.INT64))  # (batch,)
    assert past_k is not None and past_v is not None
    present = [
        context.op("TensorScatter", past, new, start, axis=2, mode="linear")
        for past, new in ((past_k, k), (past_v, v))
    ]  # fmt: skip
    scale = node.attributes["scale"].as_float()
    if _loops(context):
        y = _written_out(context, q, present, past_k, heads // kv_heads, scale)
    else:
        y = context.op("Attention", q, *present, _mask(context), scale=scale, is_causal=0)
    merged = context.op("Transpose", y, perm=[0, 2, 1, 3])  # (batch, time, heads, head_dim)
    return [context.op("Reshape", merged, context.const([0, 0, -1])), *present]


def _loops(context: Lowering) -> bool:
    """Whether the graph has, or will have, a loop: an engine with both a loop and an Attention does not build."""
    kinds = {*(CELLS if context.fixed.role == PREFILL else ()), "Loop", "Scan"}
    return context.once("loops", lambda: any(node.op_type in kinds for node in context.graph))


def _written_out(
    context: Lowering, q: ir.Value, cache: Sequence[ir.Value], past: ir.Value, group: int, scale: float
) -> ir.Value:
    """Attention as products and a softmax; the queries of one key head become one longer query."""
    assert past.shape is not None
    kv_heads, slots, head_dim = (size for size in past.shape[1:] if isinstance(size, int))
    keys, values = cache
    time = context.fixed.time
    together = context.op("Reshape", q, context.const([0, kv_heads, group * time, head_dim]))
    scores = context.op("MatMul", together, context.op("Transpose", keys, perm=[0, 1, 3, 2]))
    apart = context.op("Reshape", scores, context.const([0, kv_heads * group, time, slots]))
    seen = context.op("Add", context.op("Mul", apart, context.const(scale, np.float32)), _mask(context))
    shares = context.op(
        "Reshape", context.op("Softmax", seen, axis=-1), context.const([0, kv_heads, group * time, slots])
    )
    y = context.op("MatMul", shares, values)
    return context.op("Reshape", y, context.const([0, kv_heads * group, time, head_dim]))


def _attend(
    context: Lowering, q: ir.Value, keys: ir.Value, values: ir.Value, visible: ir.Value, form: Heads
) -> ir.Value:
    return (by_products if _loops(context) else by_masked_attention)(context, q, keys, values, visible, form)


def _steps(context: Lowering) -> ir.Value:
    return context.const(np.arange(context.fixed.time))


def _positions(context: Lowering) -> ir.Value:
    """Each new token's position in its row, (batch, time)."""

    def make() -> ir.Value:
        past = context.op("Cast", context.input("past_lengths"), to=ir.DataType.INT64)
        return context.op("Add", context.op("Unsqueeze", past, context.const([1])), _steps(context))

    return context.once("positions", make)


def _mask(context: Lowering) -> ir.Value:
    """What is added to the score of each slot for each new token, (batch, 1, time, capacity)."""

    def make() -> ir.Value:
        slots = context.const(np.arange(context.fixed.capacity)[None, None, None])
        last = context.op("Unsqueeze", _positions(context), context.const([1, 3]))
        seen, hidden = context.const(0, np.float32), context.const(_HIDDEN, np.float32)
        return context.op("Where", context.op("LessOrEqual", slots, last), seen, hidden)

    return context.once("mask", make)


def _rotate(context: Lowering, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    def positions() -> ir.Value:  # padding may point past the table; its result is not used
        return context.op("Min", _positions(context), context.const(shape_of(cos)[0] - 1))

    clipped = context.once(("rotary positions", cos.name), positions)
    return context.op("RotaryEmbedding", x, cos, sin, clipped)


RULES: Mapping[str, Rule] = {
    **standard.RULES,
    "Attention": attention,
    "Embedding": embedding,
    "Linear": linear_rule(matmul),
    "TakePositions": take_positions,
    "WindowAttention": window_rule(_steps, _attend),
    **rules(matmul, hoist=_columns),
}
