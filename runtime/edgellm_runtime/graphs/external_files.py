"""Which files an ONNX graph reads, found without the onnx package.

Walks the protocol buffer's wire format (field number and type, then a value or a length and that many bytes) along the
path from the model to each tensor's ``external_data``. It interprets nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["external_files"]

# Field numbers of onnx.proto. A message is walked into through these fields; each leads to a kind of message.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "external"},
    "external": {},
}
_MAX_DEPTH = 64
_LOCATION = re.compile(b"location")


def external_files(model: bytes) -> set[str]:
    """Every ``location`` that a tensor of the model names.

    Args:
        model: a serialized ONNX model.

    Raises:
        ValueError: it is not a protocol buffer of that shape.
    """
    found: set[str] = set()
    if not model:
        raise ValueError("the file is empty")
    _walk(memoryview(model), "model", found, 0)
    return found


def _walk(data: memoryview, kind: str, found: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs are nested too deeply")
    key = value = b""
    inner = _FIELDS[kind]
    for number, payload in _fields(data):
        if payload is None:
            continue
        if kind == "external":  # a key and a value
            key, value = (bytes(payload), value) if number == 1 else (key, bytes(payload))
        elif number in inner and _LOCATION.search(payload):  # most nodes have no such thing: the walk is spared
            _walk(payload, inner[number], found, depth + 1)
    if key == _LOCATION.pattern:
        found.add(value.decode("utf-8", "replace"))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Each field's number, and its bytes if it has a length."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length = data[position] if position < end else 0x80
            if length < 0x80:  # one byte, as nearly always: no call is made for it
                position += 1
            else:
                length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("a field is longer than the file")
            yield number, data[position : position + length]
            position += length
        elif wire == 0:
            _, position = _varint(data, position)
            yield number, None
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
            yield number, None
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
    if position != end:
        raise ValueError("the last field is cut off")


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    if position < len(data) and (result := data[position]) < 0x80:  # nearly always
        return result, position + 1
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("the file is cut off")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise ValueError("a number is too long")
