"""Protocol buffers read strictly: what a message's table does not name is refused, not skipped.

A reader of this format skips what it does not know, takes the last of several values, merges messages that come twice,
and accepts one number in several lengths. Each of these lets two readers see two different messages in the same bytes.
Here every field is known and of its type, is written once unless it may be repeated, and every number in its shortest
form, as all writers write it: so there is one reading, and any reader's is that one. Nothing here knows ONNX.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["Message", "Reader", "Table", "compiled"]

Message: TypeAlias = dict[str, Any]
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WIRES = {"int": _VARINT, "int32": _VARINT, "uint64": _VARINT, "float": _FIXED32, "double": _FIXED64}
_LEAVES = ("bytes", "opaque")  # the latter is a message that nobody looks into
_MAX_DEPTH = 64

# By a field's tag (its number and how it is written): its name, whether it may come again, what it holds.
Table: TypeAlias = Mapping[int, tuple[str, bool, str]]


def compiled(fields: Mapping[int, str]) -> Table:
    """A message's table.

    Args:
        fields: number to ``name kind``; ``*`` before the kind of one that may be repeated. A kind is one of ``int``,
            ``int32``, ``uint64``, ``float``, ``double``, ``bytes``, ``opaque``, or the name of another message.
    """
    table: dict[int, tuple[str, bool, str]] = {}
    for number, text in fields.items():
        name, kind = text.split()
        repeated, kind = kind.startswith("*"), kind.removeprefix("*")
        table[number << 3 | _WIRES.get(kind, _LENGTH)] = name, repeated, kind
        if repeated and kind in _WIRES:  # the elements of numbers may come together, "packed"
            table[number << 3 | _LENGTH] = name, repeated, kind
    return table


class Reader:
    """Reads one file's messages.

    Args:
        data: the file.
        tables: message name to its fields.
        most: fields in all; more are refused.
    """

    def __init__(self, data: bytes, tables: Mapping[str, Table], most: int) -> None:
        self._data, self._tables, self._left = data, tables, most

    def read(self, kind: str) -> Message:
        """The file as a message of that kind: field name to value, or to a list of values where it may be repeated.

        Raises:
            ValueError: it is none, or has more than one reading.
        """
        try:
            return self._message(kind, 0, len(self._data), 0)
        except IndexError:
            raise ValueError("the file is cut off") from None

    def _message(self, kind: str, at: int, end: int, depth: int) -> Message:
        if depth > _MAX_DEPTH:
            raise ValueError("messages are nested too deeply")
        data, table, found, count = self._data, self._tables[kind], Message(), 0
        while at < end:
            count += 1
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = self._varint(at - 1)
            field = table.get(tag)
            if field is None:
                raise ValueError(f"{kind} holds field {tag >> 3} of wire type {tag & 7}, which is not known")
            name, repeated, holds = field
            value: Any
            if tag & 7 == _LENGTH:
                length = data[at]
                at += 1
                if length >= 0x80:
                    length, at = self._varint(at - 1)
                start, at = at, at + length
                if at > end:
                    raise ValueError("a field is longer than what holds it")
                if holds == "bytes" or holds == "opaque":
                    value = data[start:at]
                elif holds in _WIRES:
                    found.setdefault(name, []).extend(self._packed(holds, start, at))
                    continue
                else:
                    value = self._message(holds, start, at, depth + 1)
            else:
                value, at = self._number(holds, at)
            if repeated:
                found.setdefault(name, []).append(value)
            elif name in found:
                raise ValueError(f"a {kind} has two values for {name}")
            else:
                found[name] = value
        if at != end:
            raise ValueError("the last field is cut off")
        self._left -= count
        if self._left < 0:
            raise ValueError("it has too many fields")
        return found

    def _packed(self, holds: str, at: int, end: int) -> list[Any]:
        values = []
        while at < end:
            value, at = self._number(holds, at)
            values.append(value)
        if at != end:
            raise ValueError("the last number of a list is cut off")
        self._left -= len(values)
        return values

    def _number(self, holds: str, at: int) -> tuple[int | float, int]:
        if holds == "float":
            return struct.unpack("<f", self._exactly(at, 4))[0], at + 4
        if holds == "double":
            return struct.unpack("<d", self._exactly(at, 8))[0], at + 8
        value, at = self._varint(at)
        if value >= 1 << 63 and holds != "uint64":
            value -= 1 << 64
        if holds == "int32" and not -(1 << 31) <= value < 1 << 31:  # other readers would cut its upper half off
            raise ValueError(f"{value} is too large for its field")
        return value, at

    def _exactly(self, at: int, size: int) -> bytes:
        found = self._data[at : at + size]
        if len(found) != size:
            raise ValueError("the file is cut off")
        return found

    def _varint(self, at: int) -> tuple[int, int]:
        result = 0
        for shift in range(0, 70, 7):
            byte = self._data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (not byte and shift) or result >= 1 << 64:
                    raise ValueError("a number is written longer than it is")
                return result, at
        raise ValueError("a number is too long")
