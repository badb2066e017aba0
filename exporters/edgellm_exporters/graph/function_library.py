"""PyTorch's operators as onnxscript's function library writes them, one call at a time.

The library's functions are Python that calls ONNX operators; :class:`Recorder` writes those calls down. Nothing here
knows a traced program: values go in, nodes and values come out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["OPSET", "Recorder", "Symbol", "find_function"]

OPSET = 18  # what the library is written in
_GRID_MODES = {"bilinear": "linear", "bicubic": "cubic"}


class Symbol(ir.Value):
    """A value that the library's functions may use in Python's arithmetic and comparisons."""

    def _call(self, kind: str, *inputs: Any) -> Any:
        return getattr(_opset(), kind)(*inputs)

    def __add__(self, other: Any) -> Any:
        return self._call("Add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._call("Add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._call("Sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._call("Sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._call("Mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._call("Mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._call("Div", self, other)

    def __pow__(self, other: Any) -> Any:
        return self._call("Pow", self, other)

    def __matmul__(self, other: Any) -> Any:
        return self._call("MatMul", self, other)

    def __neg__(self) -> Any:
        return self._call("Neg", self)

    def __mod__(self, other: Any) -> Any:
        floating = self.dtype is not None and self.dtype.is_floating_point()
        return _opset().Mod(self, other, fmod=1) if floating else self._call("Mod", self, other)

    def __lt__(self, other: Any) -> Any:
        return self._call("Less", self, other)

    def __le__(self, other: Any) -> Any:
        return self._call("LessOrEqual", self, other)

    def __gt__(self, other: Any) -> Any:
        return self._call("Greater", self, other)

    def __ge__(self, other: Any) -> Any:
        return self._call("GreaterOrEqual", self, other)


@functools.cache
def _opset() -> Any:
    import onnxscript.values

    return onnxscript.values.Opset("", OPSET)


def find_function(name: str, *, is_complex: bool) -> Callable[..., Any] | None:
    """The library's function for an operator.

    Args:
        name: the operator's, as PyTorch writes it: ``aten::add.Tensor``.
        is_complex: whether it takes complex numbers, which the library keeps as pairs in a last axis.
    """
    from onnxscript.function_libs.torch_lib import ops, registration

    assert ops  # whose import fills the registry
    registry = registration.default_registry
    if name not in registry:
        return None
    found = registry[name].complex if is_complex else registry[name].overloads
    function: Callable[..., Any] | None = found[0] if found else None
    return function


class Recorder:
    """Writes down what the library's functions call; follows onnxscript's protocol of an evaluator.

    Args:
        constant: gives a value for an array, one for each content.
        fresh: gives a name that no other value has.
    """

    def __init__(self, constant: Callable[[Any], ir.Value], fresh: Callable[[], str]) -> None:
        self.nodes: list[ir.Node] = []
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self._constant, self._fresh = constant, fresh

    def run(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of the library, and give what it gives: a value or several."""
        from onnxscript import evaluator

        with evaluator.default_as(self):
            return function(*args, **kwargs)

    def eval_op(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One ONNX operator, called by a function."""
        if op.name == "Constant":
            return self._constant(_constant_array(kwargs))
        signature = op.op_signature
        inputs, attributes = _bound(signature, args, kwargs)
        given = self._inputs(signature, inputs)
        if op.name == "CastLike" and given[1] is not None and given[1].dtype is not None:
            return self._node(signature, "Cast", given[:1], {"to": int(given[1].dtype)}, 1)
        return self._node(signature, op.name, given, attributes, _count(signature, attributes))

    def eval_function(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A function that is written down as a call, to be put in its place when the graph is whole."""
        signature = function.op_signature
        inputs, attributes = _bound(signature, args, kwargs)
        given = self._inputs(signature, inputs)
        whole: ir.Function = ir.serde.deserialize_function(function.to_function_proto())
        self.functions[whole.identifier()] = whole
        return self._node(signature, whole.name, given, attributes, len(signature.outputs), domain=whole.domain)

    def _node(
        self, signature: Any, kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], count: int,
        domain: str = "",
    ) -> Any:  # fmt: skip
        outputs = [Symbol(name=self._fresh()) for _ in range(count)]
        for output, param in zip(outputs, signature.outputs, strict=False):
            dtype = _dtype_of(signature, kind, param, inputs, attributes)
            output.type = None if dtype is None else ir.TensorType(dtype)
        kind, inputs, attributes = _updated(kind, inputs, attributes, self._constant)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        made = ir.convenience.convert_attributes({k: v for k, v in attributes.items() if v is not None})
        self.nodes.append(ir.Node(domain, kind, inputs, made, outputs=outputs))
        return outputs[0] if count == 1 else outputs

    def _inputs(self, signature: Any, bound: Mapping[str, Any]) -> list[ir.Value | None]:
        """Values for all that was given, constants in the dtype of what they meet."""
        dtypes: dict[str, ir.DataType] = {}
        for param in signature.inputs:
            for each in _flat(bound.get(param.name)):
                if isinstance(each, ir.Value) and each.dtype is not None:
                    dtypes.setdefault(param.type_constraint.name, each.dtype)
        given: list[ir.Value | None] = []
        for param in signature.inputs:
            found, dtype = bound.get(param.name), dtypes.get(param.type_constraint.name) or _only_dtype(param)
            if param.variadic:
                given += [self._value(each, dtype) for each in found or ()]
            elif isinstance(found, list | tuple) and found and _takes_sequence(param):
                given.append(self._node_of("SequenceConstruct", [self._value(each, dtype) for each in found]))
            else:
                given.append(self._value(found, dtype))
        return given

    def _value(self, given: Any, dtype: ir.DataType | None) -> ir.Value | None:
        if given is None or isinstance(given, ir.Value):
            return given
        if isinstance(given, list | tuple) and any(isinstance(each, ir.Value) for each in given):
            flat = self._constant(np.array([-1], dtype=np.int64))
            parts = [self._value(each, dtype) for each in given if each is not None]
            return self._node_of("Concat", [self._node_of("Reshape", [part, flat]) for part in parts], axis=0)
        if isinstance(given, ir.TensorProtocol):
            return self._constant(given)
        return self._constant(_array(given, dtype))

    def _node_of(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        op = getattr(_opset(), kind)
        made: ir.Value = self.eval_op(op, inputs, attributes)
        return made


def _constant_array(kwargs: Mapping[str, Any]) -> Any:
    """What an ONNX Constant holds."""
    ((kind, value),) = ((kind, value) for kind, value in kwargs.items() if value is not None)
    value = value.value if isinstance(value, ir.Attr) else value
    if kind == "value":
        return value
    dtype = np.int64 if "int" in kind else np.float32
    return np.array(value, dtype=dtype)


def _array(given: Any, dtype: ir.DataType | None) -> ir.TensorProtocol:
    if isinstance(given, complex):
        given = (given.real, given.imag)
    if dtype is None:
        kinds = {type(each) for each in _flat(given)}
        names = {bool: ir.DataType.BOOL, float: ir.DataType.FLOAT}
        dtype = names[float] if float in kinds else names[bool] if kinds == {bool} else ir.DataType.INT64
    return ir.tensor(np.array(given).astype(dtype.numpy()), dtype=dtype)


def _flat(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _only_dtype(param: Any) -> ir.DataType | None:
    dtypes = {getattr(allowed, "dtype", None) for allowed in param.type_constraint.allowed_types}
    return next(iter(dtypes)) if len(dtypes) == 1 else None


def _takes_sequence(param: Any) -> bool:
    return all(isinstance(allowed, ir.SequenceType) for allowed in param.type_constraint.allowed_types)


def _bound(signature: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given, by the names of inputs and of attributes."""
    inputs: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    rest = list(args)
    for param in signature.params:
        if isinstance(param, ir.schemas.Parameter):
            if param.variadic:
                inputs[param.name], rest = rest, []
            else:
                inputs[param.name] = rest.pop(0) if rest else kwargs.get(param.name)
            continue
        value = rest.pop(0) if rest else kwargs.get(param.name, param.default)
        value = value.value if isinstance(value, ir.Attr) else value
        attributes[param.name] = float(value) if param.type == ir.AttributeType.FLOAT and value is not None else value
    unknown = kwargs.keys() - {param.name for param in signature.params}
    attributes |= {name: kwargs[name] for name in unknown if signature.domain == ""}
    return inputs, attributes


def _count(signature: Any, attributes: Mapping[str, Any]) -> int:
    """How many outputs a node gets."""
    if signature.name == "Split":
        return int(attributes["num_outputs"])
    if signature.name == "BatchNormalization" and not attributes.get("training_mode"):
        return 1
    return len(signature.outputs)


def _dtype_of(
    signature: Any, kind: str, param: Any, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]
) -> ir.DataType | None:
    """The dtype of an output, where the operator's signature tells it."""
    if kind == "ConstantOfShape":
        value = attributes.get("value")
        return ir.DataType.FLOAT if value is None else value.dtype
    if kind in ("Cast", "RandomNormal", "RandomUniform", "EyeLike", "Multinomial", "Bernoulli"):
        to = attributes.get("to", attributes.get("dtype"))
        return None if to is None else ir.DataType(int(to))
    for known, value in zip(signature.inputs, inputs, strict=False):
        if known.type_constraint.name == param.type_constraint.name and value is not None and value.dtype is not None:
            return value.dtype
    return None if _takes_sequence(param) else _only_dtype(param)


def _updated(
    kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], constant: Callable[[Any], ir.Value]
) -> tuple[str, list[ir.Value | None], Mapping[str, Any]]:
    """A node of the library's opset as later opsets write it: in two operators a thing moved or was renamed."""
    given = list(inputs)
    if kind == "DFT":
        rest = {k: v for k, v in attributes.items() if k != "axis"}
        axis = constant(np.array(attributes.get("axis", 1), dtype=np.int64))
        return kind, [*given, *[None] * (2 - len(given)), axis], rest
    if kind == "GridSample":
        mode = attributes.get("mode", "bilinear")
        return kind, given, {**attributes, "mode": _GRID_MODES.get(mode, mode)}
    return kind, given, attributes
