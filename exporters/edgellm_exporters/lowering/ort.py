"""Canonical ops as ONNX Runtime's fused kernels on CPU.

Traps that this file knows (measured, see docs/benchmark-notes.md): 8-bit MatMulNBits is two orders of magnitude slower
without ``accuracy_level=4``, 2-bit MatMulNBits is with blocks that it has no kernel for, and GroupQueryAttention takes
several tokens over a filled cache only one row at a time, and no norms of queries and keys, though its schema has them.
Beside float32 it takes no cache of 16 bits, so that one is made float32 for each step and back; edgellm's own kernels
read it as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgellm.ops.attention import ATTENTION
from edgellm.ops.schema import View
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering import recurrent, standard
from edgellm_exporters.lowering.capped_attention import capped_attention
from edgellm_exporters.lowering.context import Array, Lowering, Rule, shape_of
from edgellm_exporters.lowering.expert import expert_rule
from edgellm_exporters.lowering.linears import fused_matmul, linear_rule
from edgellm_exporters.lowering.narrow_scales import scales_of
from edgellm_exporters.lowering.three_bits import spread_codes
from edgellm_exporters.quantize.plan import ROW, QuantizedWeight, Scheme, pack

__all__ = ["DOMAIN", "RULES", "check_kernel", "codes_of", "grouped_attention", "lacks_kernel", "zeros_of"]

DOMAIN = "com.microsoft"
_HEAD_DIM = 16  # GroupQueryAttention's heads have a multiple of these features
_INT8_ACTIVATIONS = 4
_TWO_BIT_BLOCKS = (32, 64, 128)  # with others, MatMulNBits makes floats of the whole weight in every step
_TOP, _MIDDLE = 127, 128  # of 8-bit codes of what a layer reads


def embedding(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GatherBlockQuantized of a quantized table, Gather of a float one."""
    weight, indices = view.weight, view.indices
    quantized = context.quantized(weight)
    if quantized is None:
        return standard.RULES["Embedding"](context, view)
    scheme = quantized.scheme
    if scheme.bits < 3 or scheme.shifted or scheme.block == ROW:
        raise LoweringError(
            f"{weight.name}: no kernel looks up rows of {scheme}; use 3, 4 or 8 bits in blocks for the embedding"
        )
    shape = (quantized.shape[0], quantized.shape[1] * scheme.kernel_bits // 8)
    rows = context.op(
        "GatherBlockQuantized", codes_of(context, weight, shape, "table"), indices,
        scales_of(context, weight), zeros_of(context, weight), domain=DOMAIN, bits=scheme.kernel_bits,
        block_size=scheme.block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    return [rows]


def _product(context: Lowering, x: ir.Value, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    if quantized.scheme.block == ROW:
        return _integer_product(context, x, weight)
    return _blockwise_product(context, x, weight, quantized)


def check_kernel(scheme: Scheme) -> None:
    """Make sure that products with such weights have a kernel of their own.

    Raises:
        LoweringError: they would be computed, but a hundred times slower.
    """
    if scheme.bits == 2 and scheme.block not in _TWO_BIT_BLOCKS:
        raise LoweringError(
            f"{scheme} weights: ONNX Runtime's MatMulNBits has no 2-bit kernel for such blocks and would take a "
            f"hundred times as long a token; use blocks of {', '.join(map(str, _TWO_BIT_BLOCKS))}, or 4 bits"
        )


def _blockwise_product(context: Lowering, x: ir.Value, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """MatMulNBits; where blocks have shifts, these are further columns that meet the sums of the input's blocks."""
    (rows, columns), scheme = quantized.shape, quantized.scheme
    check_kernel(scheme)
    if scheme.shifted:
        x = standard.with_block_sums(context, x, columns, scheme.block)
        columns += columns // scheme.block
    codes = _product_codes(context, weight, quantized)
    return context.op(
        "MatMulNBits", x, codes, scales_of(context, weight), zeros_of(context, weight), domain=DOMAIN, N=rows,
        K=columns, bits=scheme.kernel_bits, block_size=scheme.block, accuracy_level=_INT8_ACTIVATIONS,
    )  # fmt: skip


def _product_codes(context: Lowering, weight: ir.Value, quantized: QuantizedWeight) -> ir.Value:
    """Those that MatMulNBits reads, (rows, blocks, bytes of a block)."""
    size = quantized.scheme.block * quantized.scheme.kernel_bits // 8
    return codes_of(context, weight, (quantized.shape[0], quantized.blocks, size), "codes")


def _integer_product(context: Lowering, x: ir.Value, weight: ir.Value) -> ir.Value:
    """Rows of x in 8 bits, each with a scale of its own, times 8-bit weights with one scale a row.

    The kernel knows one scale for all rows of x, here 1: each row of the product is multiplied by its own after it.
    """
    columns = shape_of(weight)[1]
    codes, scales = context.once(("rounded rows", x), lambda: _rounded_rows(context, x, columns))
    one, middle = context.const(1, np.float32), context.const(_MIDDLE, np.uint8)
    y = context.op("MatMulIntegerToFloat", codes, *standard.signed_columns(context, weight, one, middle), domain=DOMAIN)
    return context.op("Mul", y, scales)


def _rounded_rows(context: Lowering, x: ir.Value, columns: int) -> tuple[ir.Value, ir.Value]:
    """Codes of x and their scales (..., 1)."""
    axis = context.const([-1])
    highest = context.op("ReduceMax", x, axis, keepdims=1)  # two reductions are faster than one of the magnitudes
    lowest = context.op("Neg", context.op("ReduceMin", x, axis, keepdims=1))
    # a row of zeros becomes 0 / 0: whatever codes that has, its product is multiplied by 0
    scales = context.op("Mul", context.op("Max", highest, lowest), context.const(1 / _TOP, np.float32))
    rows = x if x.shape is None else tuple(map(str, x.shape[:-1]))  # what has the same rows shares their middles
    middles = context.once(("middles", rows), lambda: _middles(context, scales))
    return context.op("QuantizeLinear", x, scales, middles, axis=-1, block_size=columns), scales


def _middles(context: Lowering, like: ir.Value) -> ir.Value:
    middle = ir.tensor(np.array([_MIDDLE], dtype=np.uint8))
    return context.op("ConstantOfShape", context.op("Shape", like), value=middle)


def rms_norm(context: Lowering, view: View) -> Sequence[ir.Value]:
    """SimplifiedLayerNormalization."""
    return [context.op("SimplifiedLayerNormalization", view.x, view.weight, axis=-1, epsilon=view.epsilon)]


def add_rms_norm(context: Lowering, view: View) -> Sequence[ir.Value]:
    """SkipSimplifiedLayerNormalization: the norm of a sum, and the sum."""
    y, _, _, total = context.ops(
        4, "SkipSimplifiedLayerNormalization", view.a, view.b, view.weight, domain=DOMAIN, epsilon=view.epsilon
    )
    return [y, total]


def lacks_kernel(view: View) -> str:
    """Why no kernel takes a node, which then runs in its standard form; empty where one does."""
    if view.op is not ATTENTION:
        return ""
    if view.distances is not None:
        return "a bias by distance, which is made outside the kernel"
    if (size := standard.head_dim_of(view)) % _HEAD_DIM:
        return f"head size {size}, and the kernel takes multiples of {_HEAD_DIM}"
    return (
        "sinks beside a soft cap, which no form with the kernel has" if view.sinks is not None and view.softcap else ""
    )


def attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """GroupQueryAttention with the rotation inside and the cache written in place, or kept in 8 bits."""
    if lacks_kernel(view):
        return standard.RULES["Attention"](context, view)
    longest = context.once(
        ("longest", view.past_lengths, view.lengths),
        lambda: context.op("ReduceMax", _totals(context, view), keepdims=0),
    )
    scales, half = _cache_scales(context, view), _in_halves(context, view)
    narrow: dict[str, Any] = (
        {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8} if scales else {}
    )
    inputs = [context.const(scale, np.float32) for scale in scales]
    _last(context, view)  # made here, where all layers find it

    def kernel() -> Sequence[ir.Value]:
        if not half:
            return grouped_attention(context, view, longest, *inputs, **narrow)
        y, *present = grouped_attention(context, view, longest, widened=True)
        return [y, *(context.op("Cast", cache, to=ir.DataType.FLOAT16) for cache in present)]

    if not view.softcap:
        return kernel()
    heads = (view.num_kv_heads, 1, -1)
    each = [context.const(scale.reshape(heads), np.float32) for scale in scales]
    return capped_attention(context, view, longest, _packed(view), kernel, each or (None, None), half=half)


def grouped_attention(
    context: Lowering, view: View, longest: ir.Value, *more: ir.Value | None, widened: bool = False, **attributes: Any
) -> Sequence[ir.Value]:
    """GroupQueryAttention.

    Args:
        context: of the lowering.
        view: an Attention.
        longest: the tokens of the longest row with the new ones, a scalar.
        more: what the kernel reads after the sinks.
        widened: whether the cache has fewer bits than the kernel takes, and is given to it as float32.
        attributes: of the kernel, besides those that the op has.
    """
    last, caches = _last(context, view), [view.past_k, view.past_v]
    if widened:
        caches = [context.op("Cast", cache, to=ir.DataType.FLOAT) for cache in caches]
    return context.ops(
        3, "GroupQueryAttention", *_queries_keys_values(context, view), *caches, last, longest,
        view.cos, view.sin, *_after_tables(view, more), domain=DOMAIN, num_heads=view.num_heads,
        kv_num_heads=view.num_kv_heads, scale=view.scale, do_rotary=int(view.cos is not None), **_bounds(view),
        **attributes,
    )  # fmt: skip


def _after_tables(view: View, more: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """The kernel's inputs after the rotation's tables, of which positions and a bias are never given."""
    return [None, None, view.sinks, *more] if more or view.sinks is not None else []


def _bounds(view: View) -> dict[str, float | int]:
    """What the kernel is told of soft caps and of windows.

    A window counts a token's own position, as ours does: since ONNX Runtime's pull request 25927, of September 2025.
    """
    bounds: dict[str, float | int] = {"softcap": view.softcap} if view.softcap else {}
    return bounds | ({"local_window_size": view.window} if view.window else {})


def _totals(context: Lowering, view: View) -> ir.Value:
    """The tokens of each row with the new ones, (batch,)."""
    past, new = view.past_lengths, view.lengths
    return context.once(("total", past, new), lambda: context.op("Add", past, new))


def _last(context: Lowering, view: View) -> ir.Value:
    """The slot of each row's last token, (batch,)."""
    total = _totals(context, view)
    return context.once(("last", total), lambda: context.op("Sub", total, context.const(1, np.int32)))


def _cache_scales(context: Lowering, view: View) -> list[Array]:
    """Of the features of an 8-bit cache, keys' and values'; none for floats."""
    found = [context.plan.caches.scales.get(str(past.name).removeprefix("past.")) for past in view.all(view.op.caches)]
    return [scale for scale in found if scale is not None] if all(scale is not None for scale in found) else []


def _in_halves(context: Lowering, view: View) -> bool:
    """Whether the cache is kept in float16, which the kernel does not read."""
    return all(str(past.name).removeprefix("past.") in context.plan.caches.halves for past in view.all(view.op.caches))


def _queries_keys_values(context: Lowering, view: View) -> Sequence[ir.Value | None]:
    """The first three inputs of the kernel: what was split, whole; with norms, each part on its own."""
    q, k, v = view.q, view.k, view.v
    if view.q_norm is None or view.k_norm is None:
        packed = _packed(view)
        return [q, k, v] if packed is None else [packed, None, None]
    q = _normed(context, q, view.q_norm, view.num_heads, view.epsilon)
    return [q, _normed(context, k, view.k_norm, view.num_kv_heads, view.epsilon), v]


def _normed(context: Lowering, x: ir.Value, weight: ir.Value, heads: int, epsilon: float) -> ir.Value:
    """SimplifiedLayerNormalization of each head of x (batch, time, heads * head_dim).

    ONNX Runtime finds these very nodes and puts them into its attention, where its kernel there has norms inside.
    """
    (head_dim,) = shape_of(weight)
    apart = context.op("Reshape", x, context.const([0, 0, heads, head_dim]))
    normed = context.op("SimplifiedLayerNormalization", apart, weight, axis=-1, epsilon=epsilon)
    return context.op("Reshape", normed, context.const([0, 0, heads * head_dim]))


def _packed(view: View) -> ir.Value | None:
    """The tensor that was split into just queries, keys and values, in this order, or None."""
    parts = (view.q, view.k, view.v)
    producers = {id(part.producer()) for part in parts if part is not None}
    node = parts[0].producer() if parts[0] is not None else None
    if node is None or len(producers) != 1 or node.op_type != "Split" or tuple(node.outputs) != parts:
        return None
    packed: ir.Value | None = node.inputs[0]
    return packed


def linear_attention(context: Lowering, view: View) -> Sequence[ir.Value]:
    """LinearAttention, which goes from token to token, and shares keys among neighbouring heads as we do."""
    return context.ops(
        2, "LinearAttention", view.q, view.k, view.v, view.past, view.decay, domain=DOMAIN, update_rule="gated",
        q_num_heads=view.num_groups, kv_num_heads=view.num_heads, scale=1.0,
    )  # fmt: skip


def gated_delta(context: Lowering, view: View) -> Sequence[ir.Value]:
    """LinearAttention by another rule."""
    return context.ops(
        2, "LinearAttention", view.q, view.k, view.v, view.past, view.decay, view.beta, domain=DOMAIN,
        update_rule="gated_delta", q_num_heads=view.num_groups, kv_num_heads=view.num_heads, scale=1.0,
    )  # fmt: skip


def codes_of(context: Lowering, weight: ir.Value, shape: tuple[int, ...], view: str) -> ir.Value:
    """Packed codes; every view of them shares its bytes on disk."""
    quantized = context.quantized(weight)
    assert quantized is not None
    bits = quantized.scheme.bits
    if bits == 3:
        pairs = spread_codes(context, weight, quantized)
        return context.once((view, weight.name), lambda: context.op("Reshape", pairs, context.const(shape)))
    packed = quantized.lazy(
        lambda c: pack(c.codes, bits).reshape(shape),
        np.broadcast_to(np.uint8(0), shape),
        storage=f"{weight.name}.codes",
    )
    return context.part(weight, view, packed)


def zeros_of(context: Lowering, weight: ir.Value) -> ir.Value | None:
    """Packed zeros, or None where the kernel's own, the middle code, is meant."""
    quantized = context.quantized(weight)
    assert quantized is not None
    if quantized.scheme.symmetric:
        return None
    bits = quantized.scheme.kernel_bits
    like = np.broadcast_to(np.uint8(0), (quantized.shape[0], -(-quantized.blocks * bits // 8)))
    return context.part(weight, "zeros", quantized.lazy(lambda c: pack(c.zeros, bits), like))


def _hoist(context: Lowering, weight: ir.Value) -> None:
    """The kernel reads codes as they are stored, but for those of 3 bits; scales are widened first."""
    quantized = context.quantized(weight)
    if quantized is not None and quantized.scheme.block == ROW:
        standard.row_scales_of(context, weight)
    elif quantized is not None:
        scales_of(context, weight)
        if quantized.scheme.bits == 3:
            _product_codes(context, weight, quantized)


_matmul = fused_matmul(_product)
RULES: Mapping[str, Rule] = {
    **standard.RULES,
    "AddRMSNorm": add_rms_norm,
    "Attention": attention,
    "Embedding": embedding,
    "Expert": expert_rule(_matmul, hoist=_hoist),
    "GatedDelta": gated_delta,
    "Linear": linear_rule(_matmul),
    "LinearAttention": linear_attention,
    "RMSNorm": rms_norm,
    **recurrent.rules(_matmul, hoist=_hoist, folds=True),
}
