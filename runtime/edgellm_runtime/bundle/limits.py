"""How large a bundle's files may be: known before a byte of them is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm_runtime.graphs.onnx_file import MAX_GRAPH_BYTES

__all__ = ["MAX_MANIFEST_BYTES", "MAX_WIDTH", "limit_of", "only_once", "read_json"]

MAX_MANIFEST_BYTES = 1 << 20  # a manifest of 200 layers, each with a format of its own, is a tenth of this
MAX_WIDTH = 1 << 22  # of the logits; the largest vocabulary in the field is a sixteenth of this
_MAX_OTHER_BYTES = 1 << 24  # of a file that nothing here reads
_MAX_DEPTH = 32
_LIMITS: Mapping[str, int] = {
    "tokenizer.json": 1 << 27, "chat_template.jinja": 1 << 18, "goldens.json": 1 << 24,
}  # fmt: skip


def limit_of(name: str) -> int:
    """The most bytes of a listed file that is neither weights nor an engine."""
    return MAX_GRAPH_BYTES if name.endswith(".onnx") else _LIMITS.get(name, _MAX_OTHER_BYTES)


def read_json(file: Path, most: int) -> Any:
    """What a JSON file holds.

    Args:
        file: of which nothing is believed yet.
        most: bytes that it may have.

    Raises:
        ValueError: it is larger, no JSON, nested too deeply, or has a key twice.
    """
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    try:
        found = json.loads(data, object_pairs_hook=only_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _deeper(found, _MAX_DEPTH):
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    return found


def only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for ``object_pairs_hook``: what has a key twice, readers take for different things.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)[:80]!r} is there twice")
    return found


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are within one another more often than that."""
    level = [value]
    for _ in range(depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                inner += item.values() if isinstance(item, dict) else item
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return False
    return True
