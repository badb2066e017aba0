"""Bytes and JSON spoiled at random, whatever they stand for."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

Spoiler = Callable[[random.Random, bytes], bytes]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-308,
    math.inf, math.nan, "", "a", "\0", "\ud800", "9" * 5000, "batch", "capacity", "float64", "bfloat16", "append",
    "replace", "ring", "static", "onnx", "cuda", "tensorrt", "model.onnx", "../x", "x" * 70_000, [], {}, [[]],
    [0] * 5000, {"a": {}}, {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"Regex": "(a+)+$"},
]  # fmt: skip


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes lost, repeated or moved."""
    made = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, other = draw.randrange(len(made) + 1), draw.randrange(len(made) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            del made[min(at, other) : min(at, other) + draw.choice([1, 2, 8, 100])]
        elif kind == 2:
            made[at:at] = made[other : other + draw.choice([1, 4, 64])]
        elif kind == 3:
            made[at:at] = draw.choice([b"\xff" * 10, b"\0" * 8, b"\x80\x80\x00", b"[" * 900, b"{", b'"', b"9" * 5000])
        elif made and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
    return bytes(made)


def changed_json(draw: random.Random, value: Any) -> Any:
    """One place becomes something else, is lost, or comes twice."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = draw.randrange(12)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[draw.choice(["", "x", "type", *value])] = value.pop(key)
        elif kind == 2 and isinstance(value, list):
            value += value[:1] * draw.choice([1, 50])
        elif kind == 3:
            value[key] = copy.deepcopy(draw.choice(list(value.values()) if isinstance(value, dict) else value))
        else:
            value[key] = changed_json(draw, value[key])
        return value
    if type(value) is int and draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 2, value << 20, value << 40])
    return copy.deepcopy(draw.choice(VALUES))


def as_json(draw: random.Random, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 3])):
        value = changed_json(draw, value)
    return json.dumps(value).encode()
