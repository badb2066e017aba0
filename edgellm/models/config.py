"""What the configurations of models have in common: checked when made, written and read as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

from edgellm.errors import ConfigError

__all__ = ["Shape", "check_heads", "check_kinds"]

_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_LARGEST = 1 << 31  # of a whole number: sizes, and products of two of them, that 64 bits hold


class Shape:
    """The base of a frozen dataclass of sizes; those declared as ``int`` are positive whole numbers, lists tuples."""

    ZERO: ClassVar[Collection[str]] = ()  # whole numbers that may be 0, too

    def __post_init__(self) -> None:
        for field in self._fields():
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            least = 0 if field.name in self.ZERO else 1
            if field.type == "int" and (type(value) is not int or value < least):
                wanted = "a positive whole number" if least else "a whole number, 0 for none"
                raise ConfigError(f"{field.name} is {value!r}; it must be {wanted}")

    @classmethod
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(cls)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Names and values."""
        return {field.name: getattr(self, field.name) for field in self._fields()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From what :meth:`to_json` gave.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        unknown = data.keys() - {field.name for field in cls._fields()}
        if unknown:
            raise ConfigError(f"unknown configuration keys {sorted(unknown)} for {cls.__name__}")
        return cls(**data)


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Make sure that keys and values can be shared by query heads, and that pairs of features can be turned.

    Raises:
        ConfigError: they cannot.
    """
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}, and head_dim {head_dim} even"
        )


def check_kinds(config: type, data: Mapping[str, Any]) -> None:
    """Make sure that a file has numbers, flags and texts where a configuration has them.

    Args:
        config: a dataclass; fields of other types than these it checks itself.
        data: names and values.

    Raises:
        ConfigError: a value of another type, or a number that is not finite.
    """
    for field in dataclasses.fields(config):
        wanted = _KINDS.get(str(field.type).removesuffix(" | None"))
        value = data.get(field.name)
        if wanted is None or value is None:
            continue
        most = sys.float_info.max if float in wanted else _LARGEST
        if type(value) not in wanted or (type(value) is not str and not abs(value) <= most):
            raise ConfigError(f"{field.name} is {value!r}; it must be of type {field.type} and at most {most:g}")
