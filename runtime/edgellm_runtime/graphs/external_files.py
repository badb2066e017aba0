"""Which files an ONNX graph reads, and where in them, found without the onnx package."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgellm_runtime.graphs.onnx_file import read_model, tensors_of
from edgellm_runtime.graphs.wire import Message

__all__ = ["ELEMENT_BITS", "StoredTensor", "external_files", "stored_tensors"]

# Of onnx.proto's TensorProto.DataType, those whose elements have a size: bits of each.
ELEMENT_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_EXTERNAL, _KEYS = 1, {"location", "offset", "length"}
_MOST = 1 << 62


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose numbers are in a file beside the graph.

    Args:
        name: its own.
        file: the ``location``, as it is written.
        offset: its first byte there.
        nbytes: how many it has.
    """

    name: str
    file: str
    offset: int
    nbytes: int


def external_files(model: bytes) -> set[str]:
    """Every ``location`` that a tensor of the model names.

    Args:
        model: a serialized ONNX model.

    Raises:
        ValueError: it is none, or has more than one reading.
    """
    return {tensor.file for tensor in stored_tensors(read_model(model))}


def stored_tensors(model: Message) -> list[StoredTensor]:
    """Every tensor that is in a file, wherever it is in the model.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.

    Raises:
        ValueError: a tensor that does not say clearly where it is, or how large.
    """
    return [_stored(t) for t in tensors_of(model) if t.get("external_data") or t.get("data_location", 0)]


def _stored(tensor: Message) -> StoredTensor:
    name = tensor.get("name", b"").decode("utf-8", "backslashreplace")
    if tensor.get("data_location", 0) != _EXTERNAL:
        raise ValueError(f"tensor {name!r} is said to be both in the graph and in a file")
    entries = [(e.get("key", b"").decode("latin1"), e.get("value", b"")) for e in tensor.get("external_data", ())]
    told = dict(entries)
    if len(told) != len(entries) or not told.keys() <= _KEYS or "location" not in told:
        raise ValueError(f"tensor {name!r} names its file with {[key for key, _ in entries]}")
    nbytes = _nbytes(name, tensor)
    if "length" in told and _whole(told["length"]) != nbytes:
        raise ValueError(f"tensor {name!r} has {nbytes} bytes, and {told['length']!r} in its file")
    return StoredTensor(name, told["location"].decode(), _whole(told.get("offset", b"0")), nbytes)


def _nbytes(name: str, tensor: Message) -> int:
    bits, dims = ELEMENT_BITS.get(tensor.get("data_type", 0)), tensor.get("dims", [])
    if bits is None or any(size < 0 for size in dims) or math.prod(dims) >= _MOST:
        raise ValueError(f"tensor {name!r} of element type {tensor.get('data_type', 0)} has sizes {dims[:8]}")
    return (math.prod(dims) * bits + 7) // 8


def _whole(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise ValueError(f"{digits[:20]!r} is no place in a file")
    return int(digits)
