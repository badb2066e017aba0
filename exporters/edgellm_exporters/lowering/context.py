"""What a lowering rule works with: new nodes, shared constants, and weights derived from other weights.

A rule turns one canonical node into the target's form of it. Rules know ops, never architectures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm.errors import OpError
from edgellm.ops.canonical import DOMAIN
from edgellm.ops.schema import View, view_of
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.lowering.fixed_form import Form
from edgellm_exporters.quantize.plan import Plan, QuantizedWeight
from edgellm_runtime.spec import TensorSpec

__all__ = ["CONSTANT", "Array", "Lowering", "Rule", "blank", "lower", "shape_of"]

CONSTANT = "const."  # how the names of constants begin
Array = NDArray[Any]
T = TypeVar("T")


class Lowering:
    """The state of one lowering.

    Args:
        model: the graph being lowered, in place.
        plan: which weights to quantize, and how.
        form: of a graph of fixed sizes; None for one graph for every use.
        dtype: what floats will be narrowed to after lowering.
    """

    def __init__(self, model: ir.Model, plan: Plan, form: Form | None = None, dtype: str = "float32") -> None:
        self.graph, self.plan, self._form, self.dtype = model.graph, plan, form, dtype
        self._tape = ir.tape.Tape()
        self._before: list[ir.Node] = []
        self._memo: dict[Hashable, Any] = {}

    @property
    def fixed(self) -> Form:
        """The sizes of the graph, for rules of targets whose graphs have fixed ones."""
        assert self._form is not None
        return self._form

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output, and give that."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self, outputs: int, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Add a node with several outputs, and give them."""
        return list(self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, domain=domain))

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant, made once for each distinct content."""
        array = np.asarray(value, dtype=dtype)
        key = ("const", array.dtype.str, array.shape, array.tobytes())
        return self.once(key, lambda: self._initializer(f"{CONSTANT}{len(self._memo)}", ir.tensor(array)))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time this key was asked for; for values that many nodes share."""
        if key not in self._memo:
            self._memo[key] = make()
        found: T = self._memo[key]
        return found

    def input(self, name: str) -> ir.Value:
        """A graph input by name."""
        return next(value for value in self.graph.inputs if value.name == name)

    def time(self) -> ir.Value:
        """How many tokens each row has, (1,): new ones, or, in an encoder's graph, those of the sources."""
        tokens = next(value for value in self.graph.inputs if value.name in ("tokens", "source"))
        return self.op("Shape", tokens, start=1, end=2)

    def new_input(self, spec: TensorSpec) -> ir.Value:
        """A further graph input, made when it is first asked for."""

        def make() -> ir.Value:
            dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
            value = ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype))
            self.graph.inputs.append(value)
            return value

        return self.once(("input", spec.name), make)

    def derived(self, source: ir.Value, suffix: str, make: Callable[[Array], Array], like: Array) -> ir.Value:
        """A weight computed from another when the graph is written.

        Args:
            source: an initializer.
            suffix: what to append to its name.
            make: from its array to the new one.
            like: an array of the new one's shape and dtype; its content is not read (see :func:`blank`).
        """
        tensor = _constant(source)
        name = f"{source.name}.{suffix}"
        lazy = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(make(tensor.numpy()))),
            dtype=ir.DataType.from_numpy(like.dtype), shape=ir.Shape(like.shape), name=name,
        )  # fmt: skip
        return self.once(("derived", name), lambda: self._initializer(name, lazy))

    def quantized(self, weight: ir.Value) -> QuantizedWeight | None:
        """How the plan quantizes a weight, or None if it leaves it alone."""
        assert weight.name is not None
        return self.plan.find(weight.name, _constant(weight))

    def part(self, weight: ir.Value, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer that holds a part of a quantized weight, such as its codes in the target's layout."""
        name = f"{weight.name}.{suffix}"
        return self.once(("part", name), lambda: self._initializer(name, tensor))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What nodes make within is not for those without: it is not what :meth:`once` gives afterwards."""
        before = dict(self._memo)
        yield
        made = {key: value for key, value in self._memo.items() if key not in before}
        kept = {key: v for key, v in made.items() if isinstance(v, ir.Value) and v.producer() is None}
        self._memo = before | kept

    def take_nodes(self) -> list[ir.Node]:
        """The nodes added since the last call, or since :meth:`put_back`."""
        nodes, self._before, self._tape = [*self._before, *self._tape.nodes], [], ir.tape.Tape()
        return nodes

    def put_back(self, nodes: Sequence[ir.Node]) -> None:
        """Count nodes that were taken as added, before all that is added from now on."""
        assert not self._tape.nodes
        self._before = [*self._before, *nodes]


Rule = Callable[[Lowering, View], Sequence[ir.Value]]  # the values that take the place of the node's outputs


def lower(
    model: ir.Model, rules: Mapping[str, Rule], plan: Plan, form: Form | None = None, dtype: str = "float32"
) -> None:
    """Replace every canonical node by the target's form of it, in place.

    Args:
        model: a captured graph.
        rules: canonical op name to rule.
        plan: which weights to quantize, and how.
        form: of a graph of fixed sizes.
        dtype: what floats will be narrowed to afterwards.

    Raises:
        LoweringError: no rule for a node, or a node that has what its op does not know, or what its rule does not read.
    """
    context = Lowering(model, plan, form, dtype)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    if missing := sorted({node.op_type for node in nodes} - rules.keys()):
        raise LoweringError(f"no form of {', '.join(missing)} for this target; it lowers {', '.join(sorted(rules))}")
    for node in nodes:
        rule, view = rules[node.op_type], _view(node)
        outputs = rule(context, view)
        _check_all_was_read(view, rule)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], context.take_nodes(), node.outputs, outputs
        )  # fmt: skip
    model.opset_imports.pop(DOMAIN, None)


def _view(node: ir.Node) -> View:
    try:
        view = view_of(node)
    except OpError as error:
        raise LoweringError(str(error)) from error
    assert view is not None
    return view


def _check_all_was_read(view: View, rule: Rule) -> None:
    """What a rule is given and does not look at would be left out of the graph without a word."""
    for name, value in view.unread():
        shown = repr(value.name) if isinstance(value, ir.Value) else repr(value)
        kind = "input" if name in view.op.inputs else "attribute"
        file = inspect.getsourcefile(inspect.unwrap(rule)) or rule.__module__
        raise LoweringError(
            f"{view.op.name}: the rule in {file} does not read its {kind} {name} ({shown}), and would leave it out; "
            f"let it compute with view.{name}, or view.ignore it where it changes nothing"
        )


def blank(source: ir.Value, shape: tuple[int, ...]) -> Array:
    """An array of a weight's dtype and another shape that takes no memory, to declare a derived weight with."""
    return np.broadcast_to(np.zeros((), _constant(source).dtype.numpy()), shape)


def shape_of(weight: ir.Value) -> tuple[int, ...]:
    """A weight's shape, in numbers."""
    return tuple(_constant(weight).shape.numpy())


def _constant(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise LoweringError(f"{value.name} is computed, but must be a weight known at export")
    return value.const_value
