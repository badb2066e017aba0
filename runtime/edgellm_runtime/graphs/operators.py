"""Which operators a bundle's graph may use, with the range of each attribute. What is not listed is refused by name.

The lists hold what the exporter's lowerings write, and what PyTorch's exporter makes of a module's plain tensor
arithmetic. Operators that read files, run other programs, loop as often as a number says, or hold text are left out.
Kernels check their attributes less well than their inputs, so each attribute has the range that makes sense of it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.graphs.wire import Message

__all__ = ["BODY", "TARGETS", "allowed", "misfit"]

# AttributeProto.AttributeType, and the field that each kind of value is in.
_FIELDS = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings"}
_MOST_LISTED = 64


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``, or a list of them."""

    low: int
    high: int

    def holds(self, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, int) and self.low <= v <= self.high for v in values)


@dataclass(frozen=True)
class Real:
    """A finite number, or a list of them."""

    most: float = 1e30

    def holds(self, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, float) and (abs(v) <= self.most or v == -math.inf) for v in values)


@dataclass(frozen=True)
class Word:
    """One of some words, or a list of them."""

    choices: frozenset[str]

    def holds(self, value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, bytes) and v.decode("latin1") in self.choices for v in values)


@dataclass(frozen=True)
class Letters:
    """A text of some characters only, and not a long one."""

    characters: frozenset[str]
    most: int = 256

    def holds(self, value: Any) -> bool:
        return isinstance(value, bytes) and len(value) <= self.most and set(value.decode("latin1")) <= self.characters


@dataclass(frozen=True)
class Tensor:
    """A tensor; what it may be is checked with all others."""

    def holds(self, value: Any) -> bool:
        return isinstance(value, dict)


def _words(text: str) -> Word:
    return Word(frozenset(text.split()))


Range = Whole | Real | Word | Letters | Tensor
BODY = Tensor()  # of a Scan or an If: a graph, whose nodes are checked with all others
_FLAG, _AXIS, _REAL, _VALUE = Whole(0, 1), Whole(-8, 7), Real(), Tensor()
_SIZE, _COUNT, _PLACE, _TYPE = Whole(1, 1 << 24), Whole(1, 1 << 16), Whole(-(1 << 31), (1 << 63) - 1), Whole(1, 22)
_BLOCK = Whole(0, 1 << 20)
_AUTO = _words("NOTSET VALID SAME_UPPER SAME_LOWER")
_WINDOW: Mapping[str, Range] = {
    "auto_pad": _AUTO, "dilations": _COUNT, "kernel_shape": _COUNT, "pads": Whole(0, 1 << 16), "strides": _COUNT,
}  # fmt: skip
_CELLS = _words(
    "Affine Elu HardSigmoid LeakyRelu Relu ScaledTanh Sigmoid Softplus Softsign Tanh ThresholdedRelu "
    "affine elu hardsigmoid leakyrelu relu scaledtanh sigmoid softplus softsign tanh thresholdedrelu"
)
_RECURRENCE: Mapping[str, Range] = {
    "activation_alpha": _REAL, "activation_beta": _REAL, "activations": _CELLS, "clip": _REAL, "hidden_size": _COUNT,
    "direction": _words("forward reverse bidirectional"), "layout": _FLAG,
}  # fmt: skip
_REDUCE: Mapping[str, Range] = {"axes": _AXIS, "keepdims": _FLAG, "noop_with_empty_axes": _FLAG}
_QUANTIZE: Mapping[str, Range] = {
    "axis": _AXIS,
    "block_size": _BLOCK,
    "output_dtype": Whole(0, 22),
    "precision": Whole(0, 22),
    "saturate": _FLAG,
}

# Names of operators to their attributes.
_STANDARD: Mapping[str, Mapping[str, Range]] = {
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Clip Cos Cosh Div "
    "Dropout Equal Erf Exp Expand Floor Greater GreaterOrEqual HardSwish Identity IsNaN Less LessOrEqual Log MatMul "
    "MatMulInteger Max Mean Min Mish Mul Neg NonZero Not Or PRelu Pow Range Reciprocal Relu Round SequenceAt Sigmoid "
    "Sign Sin Sinh Size Softplus Softsign Sqrt Sub Sum Tan Tanh Tile Where Xor DynamicQuantizeLinear": {},
    "Concat Flatten GatherElements Hardmax LogSoftmax OneHot Softmax Squeeze Unsqueeze Gather": {
        "axis": _AXIS, "axes": _AXIS,
    },
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare": _REDUCE,
    "ArgMax ArgMin": {"axis": _AXIS, "keepdims": _FLAG, "select_last_index": _FLAG},
    "Attention": {
        "is_causal": _FLAG, "kv_num_heads": _COUNT, "q_num_heads": _COUNT, "qk_matmul_output_mode": Whole(0, 3),
        "scale": _REAL, "softcap": _REAL, "softmax_precision": _TYPE,
    },
    "BatchNormalization InstanceNormalization": {"epsilon": _REAL, "momentum": _REAL, "training_mode": Whole(0, 0)},
    "BitShift": {"direction": _words("LEFT RIGHT")},
    "Cast": {"round_mode": _words("up down nearest"), "saturate": _FLAG, "to": _TYPE},
    "CastLike": {"round_mode": _words("up down nearest"), "saturate": _FLAG},
    "Celu Elu HardSigmoid LeakyRelu Selu Swish ThresholdedRelu": {"alpha": _REAL, "beta": _REAL, "gamma": _REAL},
    "Constant": {
        "value": _VALUE, "value_float": _REAL, "value_floats": _REAL, "value_int": _PLACE, "value_ints": _PLACE,
    },
    "ConstantOfShape": {"value": _VALUE},
    "Conv": {**_WINDOW, "group": _COUNT},
    "CumSum": {"exclusive": _FLAG, "reverse": _FLAG},
    "DequantizeLinear QuantizeLinear": _QUANTIZE,
    "Einsum": {"equation": Letters(frozenset(string.ascii_letters + ",.-> "))},
    "GRU": {**_RECURRENCE, "linear_before_reset": _FLAG},
    "GatherND": {"batch_dims": Whole(0, 7)},
    "Gelu": {"approximate": _words("none tanh")},
    "Gemm": {"alpha": _REAL, "beta": _REAL, "transA": _FLAG, "transB": _FLAG},
    "GroupNormalization": {"epsilon": _REAL, "num_groups": _COUNT, "stash_type": _TYPE},
    "If": {"else_branch": BODY, "then_branch": BODY},
    "IsInf": {"detect_negative": _FLAG, "detect_positive": _FLAG},
    "LSTM": {**_RECURRENCE, "input_forget": _FLAG},
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization": {
        "axis": _AXIS, "epsilon": _REAL, "stash_type": _TYPE,
    },
    "LpNormalization": {"axis": _AXIS, "p": Whole(1, 2)},
    "MaxPool": {**_WINDOW, "ceil_mode": _FLAG, "storage_order": _FLAG},
    "AveragePool": {**_WINDOW, "ceil_mode": _FLAG, "count_include_pad": _FLAG},
    "Mod": {"fmod": _FLAG},
    "Pad": {"mode": _words("constant reflect edge wrap")},
    "RNN": _RECURRENCE,
    "Reshape": {"allowzero": _FLAG},
    "RotaryEmbedding": {"interleaved": _FLAG, "num_heads": Whole(0, 1 << 16), "rotary_embedding_dim": _BLOCK},
    "Scan": {
        "body": BODY, "num_scan_inputs": Whole(1, 64), "scan_input_axes": _AXIS, "scan_input_directions": _FLAG,
        "scan_output_axes": _AXIS, "scan_output_directions": _FLAG,
    },
    "ScatterElements": {"axis": _AXIS, "reduction": _words("none add mul max min")},
    "ScatterND": {"reduction": _words("none add mul max min")},
    "Shape": {"start": Whole(-8, 8), "end": Whole(-8, 8)},
    "Slice": {},
    "Split": {"axis": _AXIS, "num_outputs": _COUNT},
    "SplitToSequence": {"axis": _AXIS, "keepdims": _FLAG},
    "TensorScatter": {"axis": _AXIS, "mode": _words("linear circular")},
    "TopK": {"axis": _AXIS, "largest": _FLAG, "sorted": _FLAG},
    "Transpose": {"perm": Whole(0, 7)},
    "Trilu": {"upper": _FLAG},
}  # fmt: skip
_QUANTIZED: Mapping[str, Range] = {
    "K": _SIZE,
    "N": _SIZE,
    "accuracy_level": Whole(0, 4),
    "bits": Whole(2, 8),
    "block_size": Whole(16, 1 << 16),
}
_CACHED = _words("NONE PER_TENSOR PER_CHANNEL")  # how keys and values are held in 8 bits
_FUSED: Mapping[str, Mapping[str, Range]] = {
    "FusedMatMul": {
        "alpha": _REAL, "transA": _FLAG, "transB": _FLAG, "transBatchA": _FLAG, "transBatchB": _FLAG,
    },
    "GatherBlockQuantized": {
        "bits": Whole(2, 8), "block_size": Whole(16, 1 << 16), "gather_axis": Whole(0, 1), "quantize_axis": Whole(0, 1),
    },
    "GroupQueryAttention": {
        "do_rotary": _FLAG, "k_quant_type": _CACHED, "kv_cache_bit_width": Whole(0, 8), "kv_num_heads": _COUNT,
        "local_window_size": Whole(-1, 1 << 31), "num_heads": _COUNT, "v_quant_type": _CACHED,
        "rotary_interleaved": _FLAG, "scale": _REAL, "smooth_softmax": Whole(-1, 1), "softcap": _REAL,
    },
    "LinearAttention": {
        "chunk_size": _COUNT, "kv_num_heads": _COUNT, "q_num_heads": _COUNT, "scale": _REAL,
        "update_rule": _words("linear gated gated_delta"),
    },
    "MatMulIntegerToFloat": {},
    "MatMulNBits": _QUANTIZED,
    "SkipLayerNormalization SkipSimplifiedLayerNormalization": {"epsilon": _REAL},
}  # fmt: skip


def _each(table: Mapping[str, Mapping[str, Range]], domain: str) -> dict[tuple[str, str], Mapping[str, Range]]:
    return {(domain, name): attributes for names, attributes in table.items() for name in names.split()}


_PLAIN = _each(_STANDARD, "")
_WITH_KERNELS = {**_PLAIN, **_each(_FUSED, "com.microsoft")}
# Target to the operators that its graphs may have.
TARGETS: Mapping[str, Mapping[tuple[str, str], Mapping[str, Range]]] = {
    "onnx": _PLAIN, "tensorrt": _PLAIN, "cpu": _WITH_KERNELS, "cuda": _WITH_KERNELS,
}  # fmt: skip


def allowed(target: str, domain: str, name: str) -> Mapping[str, Range] | None:
    """The attributes that an operator may have on a target; None if it may not be there."""
    return TARGETS[target].get(("" if domain == "ai.onnx" else domain, name))


def misfit(attribute: Message, ranges: Mapping[str, Range]) -> str:
    """What is wrong with an attribute, for a message; empty if it is one that the operator may have."""
    name = _text(attribute.get("name", b""))
    kind = attribute.get("type", 0)
    held = attribute.keys() - {"name", "type", "doc_string"}
    if name not in ranges:
        return f"attribute {name!r}"
    field = _FIELDS.get(kind, "")
    if held - {field} or (not held and not field.endswith("s")):  # an empty list is not written
        return f"attribute {name!r} of type {kind} in the fields {sorted(held)}"
    value = attribute.get(field, [] if field.endswith("s") else None)
    if isinstance(value, list) and len(value) > _MOST_LISTED:
        return f"attribute {name!r} of {len(value)} values"
    return "" if ranges[name].holds(value) else f"{name}={_shown(value)}"


def _shown(value: Any) -> str:
    return repr(_text(value) if isinstance(value, bytes) else value)[:60]


def _text(value: bytes) -> str:
    return value[:60].decode("utf-8", "backslashreplace")
