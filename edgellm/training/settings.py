"""Configuration fields as ``name=value`` text, typed by the configuration's own dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgellm.errors import ConfigError

__all__ = ["parse_settings"]

BOOLEANS = {"true": True, "false": False}


def parse_settings(config: type, settings: Sequence[str]) -> dict[str, Any]:
    """Values for a configuration's fields.

    Args:
        config: a dataclass.
        settings: such as ``width=64`` or ``pattern=gru,gru``.

    Raises:
        ConfigError: not of that form, a field that is not there, or a value that is not of its type.
    """
    hints = typing.get_type_hints(config)
    names = [f.name for f in dataclasses.fields(config)]
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"setting {setting!r} has no '='; write name=value, such as width=64")
        if name not in names:
            raise ConfigError(f"the model has no setting {name!r}; it has {', '.join(names)}")
        values[name] = _parse(name, text, hints[name])
    return values


def _parse(name: str, text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return _parse(name, text, next(a for a in arguments if a is not type(None)))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return tuple(_parse(name, item.strip(), arguments[0]) for item in text.split(",") if item.strip())
    readers: Mapping[Any, Callable[[str], Any]] = {
        int: int, float: float, str: str, bool: lambda word: BOOLEANS[word.lower()]
    }  # fmt: skip
    if hint not in readers:
        raise ConfigError(f"{name} cannot be set from text; change it in a configuration made in Python")
    try:
        return readers[hint](text)
    except (ValueError, KeyError):
        wanted = "true or false" if hint is bool else f"{'an' if hint is int else 'a'} {hint.__name__}"
        raise ConfigError(f"{name} is {text!r}; it must be {wanted}") from None
