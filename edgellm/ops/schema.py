"""What an op is, in one value: its inputs, outputs and attributes by name, what may be done with them, its reference.

Everything that looks at a canonical node does so through its :class:`Op`: rules, passes, quantization. A position or a
default stands nowhere else. Nothing here knows a graph library: a node is anything with inputs, outputs and attributes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from edgellm.errors import OpError
from edgellm.ops.canonical import DOMAIN, capturing, emit

__all__ = ["OPS", "REQUIRED", "Op", "View", "computed_by", "find_op", "view_of", "views"]

OPS: Final[dict[str, Op]] = {}  # every op by its name, filled as ops are defined
Like = Tensor | tuple[torch.dtype, Sequence[int | torch.SymInt]]  # an output's dtype and shape
_OTHERS: ContextVar[Mapping[str, Callable[..., Any]]] = ContextVar("others", default=MappingProxyType({}))


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = _Required()  # in the place of an attribute's default


def _no_reference() -> None:
    """What an op has until it is given a reference."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One canonical op.

    Calling it runs the reference; while ``torch.export`` traces, it leaves one node of the ``edgellm`` domain instead.

    Args:
        name: of its nodes; no two ops share one.
        inputs: the reference's first parameters, in order. One whose default there is None may be left out.
        outputs: what it gives, in order; names differ from those of inputs and attributes.
        attributes: the reference's further parameters with their defaults, or :data:`REQUIRED`.
        matrices: inputs that are weights (rows, columns) and may be quantized.
        tables: those of them of which rows are looked up.
        products: those of them that meet an input in a product X W^T and nothing else, with the name of that input.
        scaled_by: to an output, the inputs whose first axis its last one follows: what these are multiplied by there,
            the output is multiplied by.
        caches: inputs that keep one slot for each token, with the outputs that they become.
        states: other inputs that are carried from step to step, with the outputs that they become.
        functions: PyTorch's own functions and operators that are captured as this op, each with what emits it.
        like: from the reference's arguments, the dtype and shape of each output, or a tensor that has them; None to run
            the reference on tensors without numbers.
        reference: the definition, in differentiable PyTorch. On a target without a rule for the op it is its form, so
            it must then be traceable as a model is.

    Raises:
        OpError: there is no reference, it has other parameters, or the name is another op's.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    matrices: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    products: Mapping[str, str] = field(default_factory=dict)
    scaled_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caches: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[Any, Callable[..., Tensor]] = field(default_factory=dict)
    like: Callable[..., Sequence[Like]] | None = None
    reference: Callable[..., Any] = _no_reference
    optional: frozenset[str] = field(init=False)
    floats: frozenset[str] = field(init=False)  # attributes that the reference takes as floats

    def __post_init__(self) -> None:
        if self.reference is _no_reference:
            raise OpError(
                f"op {self.name} has no reference; give it reference=, its definition in PyTorch, in {_file()}"
            )
        if not inspect.isfunction(self.reference):
            kind = type(self.reference).__name__
            raise OpError(f"op {self.name}: its reference is a {kind}; give a function written in Python, in {_file()}")
        parameters = inspect.signature(self.reference).parameters
        self._check_parameters(parameters)
        self._check_names()
        object.__setattr__(self, "optional", frozenset(n for n in self.inputs if parameters[n].default is None))
        floats = frozenset(n for n in self.attributes if parameters[n].annotation in (float, "float"))
        object.__setattr__(self, "floats", floats)
        other = OPS.get(self.name)
        if other is not None and _place(other.reference) != _place(self.reference):
            raise OpError(
                f"op {self.name} is defined in {_source(other.reference)} and again in {_source(self.reference)}; give "
                "one of them another name"
            )
        OPS[self.name] = self  # a cell or a module that is run again defines its ops anew

    def _check_parameters(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        """The schema says what the reference's signature says."""
        wanted = [*self.inputs, *self.attributes]
        wrong = (
            "" if list(parameters) == wanted else f"takes ({', '.join(parameters)}), the op says ({', '.join(wanted)})"
        )
        for name, parameter in parameters.items() if not wrong else ():
            absent = parameter.default is parameter.empty
            if name in self.inputs and not (absent or parameter.default is None):
                wrong = f"has a default for the input {name} that is not None"
            elif name in self.attributes and (REQUIRED if absent else parameter.default) != self.attributes[name]:
                default = "none" if absent else repr(parameter.default)
                wrong = f"has default {default} for {name}, the op says {self.attributes[name]!r}"
        if wrong:
            raise OpError(
                f"op {self.name} and its reference disagree: {self.reference.__name__} {wrong}; correct "
                f"{_source(self.reference)}"
            )

    def _check_names(self) -> None:
        every = [*self.inputs, *self.attributes, *self.outputs]
        twice = sorted({n for n in every if every.count(n) > 1 or n in (*dir(View), "op", "node")})
        named = {*self.matrices, *self.tables, *self.products.values(), *self.caches, *self.states}
        named |= {n for names in self.scaled_by.values() for n in names}
        outputs = {*self.scaled_by, *self.caches.values(), *self.states.values()}
        unknown = sorted((named - {*self.inputs}) | (outputs - {*self.outputs}))
        unknown += sorted({*self.tables, *self.products} - {*self.matrices})
        if twice or unknown:
            what = f"{twice} would mean two things" if twice else f"it has no input, output or matrix {unknown}"
            raise OpError(f"op {self.name}: {what}; correct the names in {_source(self.reference)}")

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The reference's result, or the outputs of a node while a model is captured."""
        if not capturing():
            return _OTHERS.get().get(self.name, self.reference)(*given, **named)
        names = (*self.inputs, *self.attributes)
        if len(given) > len(names):
            raise OpError(f"{self.name} is called with {len(given)} values; it takes {', '.join(names)}")
        return self.emit(**dict(zip(names, given, strict=False)), **named)

    @property
    def otherwise(self) -> bool:
        """Whether something else than its reference computes it now; see :func:`computed_by`."""
        return self.name in _OTHERS.get()

    def emit(self, **named: Any) -> Any:
        """Put a node in the graph being traced.

        Args:
            named: inputs and attributes.

        Returns:
            The node's output, or a tuple of them.

        Raises:
            OpError: a required input or attribute is missing, or one is unknown.
        """
        inputs, attributes = self.arguments(**named)
        outputs = emit(self.name, inputs, [_like(x) for x in self._outputs_like(named)], attributes)
        return outputs[0] if len(outputs) == 1 else outputs

    def _outputs_like(self, named: Mapping[str, Any]) -> Sequence[Like]:
        if self.like is not None:
            return self.like(**named)
        with disable_proxy_modes_tracing():  # the tensors have no numbers: only shapes are computed
            found = self.reference(**named)
        outputs = (found,) if isinstance(found, Tensor) else tuple(found)
        if len(outputs) != len(self.outputs):
            raise OpError(
                f"op {self.name} says that it gives {', '.join(self.outputs)}, and its reference gives {len(outputs)} "
                f"tensors; correct {_source(self.reference)}"
            )
        return outputs

    def arguments(self, **named: Any) -> tuple[list[Any], dict[str, Any]]:
        """A node's inputs, None where one is left out between others, and its attributes that are not the defaults.

        Raises:
            OpError: a required input or attribute is missing, or one is unknown.
        """
        unknown = sorted(named.keys() - {*self.inputs, *self.attributes})
        required = [n for n in self.inputs if n not in self.optional]
        required += [n for n, default in self.attributes.items() if default is REQUIRED]
        missing = [n for n in required if named.get(n) is None]
        if unknown or missing:
            what = f"has no {', '.join(unknown)}" if unknown else f"is captured without {', '.join(missing)}"
            raise OpError(f"{self.name} {what}; it takes {', '.join([*self.inputs, *self.attributes])}")
        inputs = [named.get(n) for n in self.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        for name in self.attributes:
            if isinstance(named.get(name), Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                raise OpError(
                    f"{self.name}: the attribute {name} is a {type(named[name]).__name__}; attributes are numbers and "
                    "texts that are known at export, so make it an input"
                )
        given = {n: float(named[n]) if n in self.floats else named[n] for n in self.attributes if n in named}
        return inputs, {n: value for n, value in given.items() if _differs(value, self.attributes[n])}

    def node(self, make: Callable[..., Any], **named: Any) -> Any:
        """A node of a graph library, made by its ``make(name, inputs, domain=, attributes=, num_outputs=)``."""
        inputs, attributes = self.arguments(**named)
        return make(self.name, inputs, domain=DOMAIN, attributes=attributes, num_outputs=len(self.outputs))

    def of(self, node: Any) -> View:
        """A node of this op, read by names.

        Raises:
            OpError: the node has inputs or attributes that the op does not know.
        """
        return View(self, node)


class View:
    """A canonical node whose inputs, outputs and attributes are read by their names in its :class:`Op`.

    An input that is left out is None, an attribute that is left out is its default. What is read is remembered.

    Args:
        op: what the node is.
        node: anything with ``inputs`` and ``outputs`` in order and ``attributes`` by name, whose ``value`` is read.
    """

    def __init__(self, op: Op, node: Any) -> None:
        self.op, self.node = op, node
        if unknown := self._unknown():
            raise OpError(
                f"a node {op.name} has {unknown} that the op does not know; it takes "
                f"{', '.join([*op.inputs, *op.attributes])}: add it to {_source(op.reference)}, or leave it out"
            )
        absent = [None] * len(op.inputs)
        self._inputs = dict(zip(op.inputs, [*node.inputs, *absent], strict=False))
        self._outputs = dict(zip(op.outputs, node.outputs, strict=False))
        self._read: set[str] = set()

    def _unknown(self) -> str:
        extra = sorted(set(self.node.attributes) - set(self.op.attributes))
        if extra:
            return f"an attribute {', '.join(extra)}"
        more = len(self.node.inputs) - len(self.op.inputs)
        return f"{more} more inputs" if more > 0 else ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy that is being made has no fields yet
            raise AttributeError(name)
        if name in self._outputs:
            return self._outputs[name]
        if name in self._inputs:
            self._read.add(name)
            return self._inputs[name]
        if name in self.op.attributes:
            self._read.add(name)
            return self._attribute(name)
        raise AttributeError(f"{self.op.name} has no {name}; it has {', '.join([*self._inputs, *self.op.attributes])}")

    def _attribute(self, name: str) -> Any:
        found = self.node.attributes.get(name)
        default = self.op.attributes[name]
        if found is None and default is REQUIRED:
            raise OpError(f"a node {self.op.name} has no {name}, which every one must have; capture the model again")
        return default if found is None else found.value

    def all(self, names: Iterable[str]) -> list[Any]:
        """Inputs or outputs by name."""
        return [getattr(self, name) for name in names]

    def name_of(self, output: Any) -> str:
        """What an output of the node is called in the op."""
        return next(name for name, value in self._outputs.items() if value is output)

    def ignore(self, *names: str) -> None:
        """Say that these are rightly not read."""
        for name in names:
            getattr(self, name)

    def unread(self) -> list[tuple[str, Any]]:
        """Inputs that are there, and attributes that are not their defaults, that nobody has read."""
        left = [(n, v) for n, v in self._inputs.items() if v is not None and n not in self._read]
        attributes = [(n, self._attribute(n)) for n in self.node.attributes if n not in self._read]
        return left + [(n, value) for n, value in attributes if _differs(value, self.op.attributes[n])]


@contextmanager
def computed_by(others: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have some ops computed by other functions than their references, such as by what rounds as a kernel does.

    Args:
        others: by op's name, what takes its reference's arguments; for as long as the block runs, in this thread.
    """
    token = _OTHERS.set({**_OTHERS.get(), **others})
    try:
        yield
    finally:
        _OTHERS.reset(token)


def find_op(name: str) -> Op:
    """The op of that name.

    Raises:
        OpError: none is defined.
    """
    if name not in OPS:
        raise OpError(
            f"no op {name} is defined; import the module that defines it, or name one of {', '.join(sorted(OPS))}"
        )
    return OPS[name]


def view_of(node: Any) -> View | None:
    """A node read by names; None if it is not canonical."""
    return find_op(node.op_type).of(node) if node is not None and node.domain == DOMAIN else None


def views(nodes: Iterable[Any], *ops: Op) -> Iterator[View]:
    """The canonical nodes among these, all of them or those of some ops."""
    for node in nodes:
        if node.domain == DOMAIN and (not ops or node.op_type in {op.name for op in ops}):
            yield find_op(node.op_type).of(node)


def _differs(value: Any, default: Any) -> bool:
    plain = [tuple(x) if isinstance(x, list) else x for x in (value, default)]
    return bool(plain[0] != plain[1])


def _like(output: Like) -> tuple[torch.dtype, Sequence[int | torch.SymInt]]:
    return (output.dtype, output.shape) if isinstance(output, Tensor) else output


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _source(function: Callable[..., Any]) -> str:
    """The file to change."""
    return inspect.getsourcefile(inspect.unwrap(function)) or function.__module__


def _file() -> str:
    """The file that is defining an op right now."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in (
        __file__,
        "<string>",
    ):  # a dataclass makes the latter
        frame = frame.f_back
    return frame.f_code.co_filename
