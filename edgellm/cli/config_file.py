"""A command's options from a TOML file: defaults that the command line overrides."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

__all__ = ["read_config"]

_SETTINGS = "set"


def read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make a file's values the defaults of the command at hand; a callback of an eager option.

    Raises:
        click.BadParameter: the file cannot be read, or holds what the command has no option for.
    """
    if path is None:
        return
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read ({error.strerror})", context, parameter) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML ({error})", context, parameter) from None
    options = {_name(p): p for p in context.command.params if isinstance(p, click.Option) and p is not parameter}
    defaults: dict[str, Any] = {}
    for key, value in data.items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name is None:
            raise click.BadParameter(f"{path}: no option {key!r}; known: {', '.join(options)}", context, parameter)
        defaults[option.name] = _value(option, value, f"{path}: {key}", context, parameter)
    context.default_map = {**(context.default_map or {}), **defaults}


def _name(option: click.Option) -> str:
    return max(option.opts, key=len).removeprefix("--")


def _value(option: click.Option, value: Any, place: str, context: click.Context, parameter: click.Parameter) -> Any:
    if _name(option) == _SETTINGS and isinstance(value, dict):
        return [f"{name}={_text(item)}" for name, item in value.items()]
    items = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or (isinstance(value, list) and not option.multiple):
        raise click.BadParameter(f"{place} is {value!r}; give one value", context, parameter)
    try:
        checked = [option.type.convert(_text(item), option, context) for item in items]
    except click.BadParameter as error:
        raise click.BadParameter(f"{place}: {error.message}", context, parameter) from None
    return checked if option.multiple else checked[0]


def _text(value: Any) -> str:
    """As the command line would spell it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)
