"""Jinja as chat templates know it: the helpers, tags and filters that Hugging Face's renderer gives them.

What a template may spend is bounded in :mod:`edgellm_runtime.text.template_limits`.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace

from edgellm_runtime.text.template_limits import LimitedEnvironment

__all__ = ["TemplateRefusal", "clock", "environment"]


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it on the instance

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As dict's own."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def environment() -> LimitedEnvironment:
    """Where templates are compiled."""
    made = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception, "strftime_now": clock(), "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    made.limit_filters()
    return made


def clock(at: datetime.datetime | None = None) -> Any:
    """A ``strftime_now`` whose now stays what it is, so that two renderings can be compared; None for this moment."""
    now = at or datetime.datetime.now()

    def strftime_now(form: str) -> str:
        return now.strftime(form)

    return strftime_now


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace, whose names may not begin with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)
