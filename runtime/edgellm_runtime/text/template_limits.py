"""What a chat template may spend: steps, characters, seconds. All limits of templates are here.

Jinja's sandbox keeps a template from Python and from files, and bounds its ranges. It does not bound loops within
loops, texts that are multiplied or doubled, filters that pad, or lists that hold one another; this does. Everything
that makes a value (products, sums, joins, calls, filters, slices, output) is weighed before it is made where it can
be larger than what it is made from, and paid for from one budget for each rendering.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, MappingView, Sized
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["LimitedEnvironment", "TemplateLimitError", "rendering"]

_STEPS = 20_000_000  # parts of the template that are looked at; a chat of 500 messages takes a twentieth of this
_CHARACTERS = 64 << 20  # of all texts that are made on the way
_SECONDS = 10.0
_LARGEST = 4 << 20  # characters of one text, or parts of one list
_WIDTH = 10_000  # of what pads
_BITS = 4096  # of one number
_NUMBER = re.compile(r"\d{5}|\*|\{[^{}]*\{")  # in a form: a width of five digits, or one that comes from elsewhere
_METHODS = {  # of Python's own kinds, those that no template can do harm with; what grows is checked
    kind: frozenset(names.split())
    for kind, names in {
        "str": "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha "
        "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower "
        "lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split "
        "splitlines startswith strip swapcase title upper zfill",
        "dict": "copy get items keys values",
        "list": "copy count index",
        "tuple": "count index",
        "float": "is_integer",
        "int": "",
        "bool": "",
        "bytes": "",
    }.items()
}
_PADS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "batch", "slice", "indent"})
_NO_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")  # slow on long texts, and unused
_JSON_INDENT, _JSON_OPTIONS = 64, 200  # spaces, and characters of all that tojson is told


class TemplateLimitError(Exception):
    """A template spends more than it may."""


class _Budget:
    def __init__(self, size: int) -> None:
        self.steps, self.characters = _STEPS, _CHARACTERS + 16 * size
        self.largest = _LARGEST + 4 * size
        self.end = time.monotonic() + _SECONDS

    def pay(self, steps: int, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            what = f"{_STEPS} steps" if self.steps < 0 else f"{_CHARACTERS} characters"
            raise TemplateLimitError(f"it takes more than {what}")
        if time.monotonic() > self.end:
            raise TemplateLimitError(f"it takes more than {_SECONDS:g} seconds")


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def rendering(size: int = 0) -> Iterator[None]:
    """One budget for what is compiled or rendered in the block.

    Args:
        size: characters of what is given to the template.
    """
    token = _BUDGET.set(_Budget(size))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def _pay(steps: int, characters: int = 0) -> None:
    _BUDGET.get().pay(steps, characters)


def _weigh(*values: Any) -> int:
    """Characters that values have when they are written out, each as often as it is there; refuses too many."""
    known: dict[int, int] = {}
    total = sum(_weight(value, known, 0) for value in values)
    _fits(total)
    return total


def _weight(value: Any, known: dict[int, int], depth: int) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > _BITS:
            raise TemplateLimitError(f"it makes a number of more than {_BITS} bits")
        return 8
    if depth > 100:
        raise TemplateLimitError("it makes lists that are nested too deeply")
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, Namespace):
        inner = object.__getattribute__(value, "_Namespace__attrs").values()
    elif isinstance(value, (list, tuple, set, frozenset, MappingView)):
        inner = value
    elif isinstance(value, range):
        return len(value)
    if id(value) not in known:
        known[id(value)] = 1 << 62  # of what holds itself
        known[id(value)] = 4 + sum(2 + _weight(v, known, depth + 1) for v in inner)
    return known[id(value)]


def _fits(characters: int) -> None:
    if characters > (largest := _BUDGET.get().largest):
        raise TemplateLimitError(f"it makes a value of more than {largest} characters")


def _check_form(form: Any) -> None:
    """Refuse a pattern for ``format`` or ``%`` that pads by more than a few characters."""
    if isinstance(form, (str, bytes)) and _NUMBER.search(form if isinstance(form, str) else form.decode("latin1")):
        raise TemplateLimitError("it pads a text by more than it may")


def _check_growth(name: str, source: Any, values: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Refuse a method or a filter whose result is much larger than what it is given."""
    if name in _PADS:
        widths = [abs(v) for v in (*values, *keywords.values()) if isinstance(v, int)]
        texts = [len(v) for v in (*values, *keywords.values()) if isinstance(v, str)]
        if any(width > _WIDTH for width in widths):
            raise TemplateLimitError(f"it pads by more than {_WIDTH}")
        if isinstance(source, str):
            breaks = source.count("\t") if name == "expandtabs" else len(source.splitlines())
            _fits(len(source) + (1 + breaks) * max([*widths, *texts, 0]))
    elif name == "tojson":
        options = (*values, *keywords.values())
        if _weigh(*options) > _JSON_OPTIONS or any(isinstance(v, int) and abs(v) > _JSON_INDENT for v in options):
            raise TemplateLimitError("it indents JSON by more than it may")
    elif name == "replace" and isinstance(source, str) and len(values) > 1:
        old, new = str(values[0]), str(values[1])
        _fits(len(source) + (source.count(old) if old else len(source) + 1) * len(new))
    elif name == "join" and isinstance(source, str) and values and isinstance(values[0], Sized):
        _fits(_weigh(values[0]) + len(source) * len(values[0]))
    elif name == "join" and isinstance(source, Sized):
        _fits(_weigh(source) + sum(len(v) for v in (*values, *keywords.values()) if isinstance(v, str)) * len(source))
    elif name in ("format", "format_map"):
        _check_form(source)


def _paid(value: Any) -> Any:
    """The value, for which its size has been paid."""
    _pay(1, _weigh(value))
    return value


def _weighed(value: Any) -> Any:
    """The value, which is no larger than it may be."""
    _pay(1 + _weigh(value) // 64)
    return value


def _joined(*values: Any) -> str:
    """What ``~`` makes."""
    _weigh(*values)
    text = "".join(map(str, values))
    _pay(1, len(text))
    return text


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or the context

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        given = args[skipped:]
        size = _weigh(*given, *kwargs.values())
        _pay(1 + size // 16)
        if given:
            _check_growth(name, given[0], given[1:], kwargs)
        return _paid(function(*args, **kwargs))

    return limited


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates pay for what they do; use it within :func:`rendering`.

    Give it its filters and globals, then call :meth:`limit_filters`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    pay = staticmethod(_pay)  # these four for what _Counting puts in
    paid = staticmethod(_paid)
    weighed = staticmethod(_weighed)
    joined = staticmethod(_joined)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_paid, **options)
        self.globals.pop("lipsum", None)

    def limit_filters(self) -> None:
        """Let every filter and test that is known now pay, and take away filters that no template needs."""
        for name in _NO_FILTERS:
            self.filters.pop(name, None)
        tables: tuple[dict[str, Any], ...] = (self.filters, self.tests)
        for table in tables:
            table.update({name: _limited(name, function) for name, function in table.items()})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = super()._parse(source, name, filename)
        return _Counting().visit(template)  # type: ignore[no-any-return]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See :meth:`jinja2.sandbox.SandboxedEnvironment.call_binop`."""
        _weigh(left, right)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int):
                    _fits(_weigh(many) * abs(times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _BITS:
                raise TemplateLimitError(f"it makes a number of more than {_BITS} bits")
        elif operator == "%":
            _check_form(left)
        return _paid(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`jinja2.sandbox.SandboxedEnvironment.call`."""
        if __obj is _pay or __obj is _paid or __obj is _weighed or __obj is _joined:
            return __obj(*args)
        _weigh(*args, *kwargs.values())
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox puts its own in the place of a text's format
        source, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        kind = "str" if isinstance(source, str) else type(source).__name__
        if kind in _METHODS:
            if name not in _METHODS[kind]:
                raise TemplateLimitError(f"it calls {kind}.{name}, which no template needs")
            _check_growth(name, source, args, kwargs)
        return _paid(super().call(__context, __obj, *args, **kwargs))


class _Counting(NodeTransformer):
    """Puts the paying into a template: once for each turn of a loop and each call of a macro, and for what is made."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(cost))
        if node.test is not None:
            node.test = nodes.And(nodes.Not(cost), node.test)  # paying gives None
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(cost))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        cost = _cost(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(cost))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        holders: tuple[Any, ...] = (node, *node.ops)
        for holder in holders:
            if not isinstance(holder.expr, nodes.Const):
                holder.expr = _call("weighed", [holder.expr], node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node, [pair.value for pair in node.items])

    def _made(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Node:
        """A list is weighed when it is made, so that none holds the same one twice, and so on, without end."""
        if all(isinstance(item, nodes.Const) for item in items):
            return node
        self.generic_visit(node)
        return _call("weighed", [node], node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("paid", [node], node) if isinstance(node.arg, nodes.Slice) else node


def _cost(node: nodes.Node) -> nodes.Call:
    parts = sum(1 for _ in node.find_all(nodes.Node))
    texts = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return _call("pay", [nodes.Const(parts), nodes.Const(texts)], node)


def _call(name: str, values: list[nodes.Expr], where: nodes.Node) -> nodes.Call:
    """The call of an environment's own function."""
    made = nodes.Call(nodes.EnvironmentAttribute(name), values, [], None, None)
    made.set_lineno(where.lineno)
    if where.environment is not None:
        made.set_environment(where.environment)
    return made
