"""The fields of a request's JSON, read one by one, so that what nobody has read is told and not passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.faults import ApiError

__all__ = ["Fields", "json_object"]

_DEEPEST = 64
_LONGEST = 1024  # characters of a text that is one of a list
_ABSENT: Final = object()


def json_object(data: bytes) -> dict[str, Any]:
    """A request's body.

    Raises:
        ApiError: it is no JSON, or no object, or too deep.
    """
    try:
        found = json.loads(data.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise ApiError("The body is nested too deeply; send flat JSON.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ApiError(f"The body is no JSON ({str(error)[:120]}); send a JSON object.") from None
    if not isinstance(found, dict):
        raise ApiError(f"The body is {shown(found)}; send a JSON object.")
    if _depth(found) > _DEEPEST:
        raise ApiError("The body is nested too deeply; send flat JSON.")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any) -> int:
    """How deep lists and objects lie in one another, or a number above the limit."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        level = [
            item for v in level if isinstance(v, (dict, list)) for item in (v.values() if isinstance(v, dict) else v)
        ]
        depth += 1
    return depth


class Fields:
    """The fields of an object. What is ``null`` counts as not there.

    Args:
        data: the object.
        where: its name in messages, with a point behind it; empty for the body.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "") -> None:
        self._data, self._where = data, where
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """A field as it is; None where it is not there."""
        self._read.add(name)
        return self._data.get(name)

    def need(self, name: str) -> Any:
        """A field that must be there."""
        if (value := self.get(name)) is None:
            raise ApiError(f"Missing required parameter: '{self._where}{name}'.", param=self._where + name,
                           code="missing_required_parameter")  # fmt: skip
        return value

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def object(self, name: str) -> Fields | None:
        """An object's fields."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self._where}{name}.")

    def texts(self, name: str, most: int) -> list[str]:
        """A text, or a list of them."""
        value = self.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        right = isinstance(found, list) and len(found) <= most
        if not right or not all(isinstance(t, str) and 0 < len(t) <= _LONGEST for t in found):
            raise self.wrong(name, value, f"a string, or a list of at most {most}, of 1 to {_LONGEST} characters")
        return found

    def name(self, name: str) -> str:
        """A field's whole name, for messages."""
        return self._where + name

    def all(self) -> dict[str, Any]:
        """All fields as they are, read hereby."""
        self._read.update(self._data)
        return dict(self._data)

    def ignore(self, *names: str) -> None:
        """Let fields be there that change nothing here."""
        self._read.update(names)

    def refuse(self, **fields: Any) -> None:
        """Refuse what is not supported, by name.

        Args:
            **fields: to the values that ask for nothing, a tuple of them.
        """
        for name, idle in fields.items():
            value = self.get(name)
            if value is not None and value not in idle:
                raise self.unsupported(name)

    def unsupported(self, name: str, whom: str = "by this server") -> ApiError:
        """The error of a field that asks for what is not there."""
        return ApiError(f"'{self._where}{name}' is not supported {whom}; leave it out.",
                        param=self._where + name, code="unsupported_parameter")  # fmt: skip

    def done(self) -> None:
        """Refuse what nobody has read."""
        if unknown := sorted(self._data.keys() - self._read):
            name = self._where + unknown[0][:100]
            raise ApiError(f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")

    def wrong(self, name: str, value: Any, wanted: str) -> ApiError:
        """The error of a field with another value than may be."""
        return ApiError(
            f"Invalid value for '{self._where}{name}': {shown(value)}; it must be {wanted}.",
            param=self._where + name, code="invalid_value",
        )  # fmt: skip
