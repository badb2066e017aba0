"""A graph whose largest products are made some rows of their weight at a time.

A kernel that widens a quantized weight makes floats of all of it: for a vocabulary of 150,000, more than the rest of
the model takes. A part of its rows gives a part of the outputs, and reads its codes where they are in the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm_runtime.graphs.external_files import StoredTensor, stored_tensors
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model
from edgellm_runtime.graphs.rewriting import with_initializers, with_others
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, Node, message, number, text

__all__ = ["WIDENED_BYTES", "with_product_parts"]

WIDENED_BYTES = 32 << 20  # of floats that one part may become
_TOGETHER = 16  # outputs, of which kernels compute so many at once or fewer: cut elsewhere, sums are in another order
_OUTSIDE = 1  # of TensorProto.DataLocation
_ROW_BY_ROW = (b"Cast", b"Mul")  # what scales are made with
_CODES = 1  # which input they are; scales, and zero points if any, come after


@dataclass(frozen=True)
class _Codes:
    """A weight's codes in a file: bytes, the same number for each row."""

    place: StoredTensor
    dims: Sequence[int]

    def part(self, name: str, start: int, stop: int) -> bytes:
        """Some rows of them as an initializer of that name."""
        row = self.place.nbytes // self.dims[0]
        told = {"location": self.place.file, "offset": self.place.offset + start * row, "length": (stop - start) * row}
        entries = b"".join(message(13, text(1, key) + text(2, str(value))) for key, value in told.items())
        sizes = b"".join(number(1, size) for size in (stop - start, *self.dims[1:]))
        return sizes + number(2, ELEMENT_TYPES["uint8"]) + text(8, name) + entries + number(14, _OUTSIDE)


def with_product_parts(model: bytes, most: int = WIDENED_BYTES) -> bytes:
    """The same graph with several products in the place of each whose weight, in floats, is too large.

    Args:
        model: the serialized model; its products are MatMulNBits.
        most: bytes of floats that a product's weight may become, unless 16 rows are more.
    """
    read = read_model(model)
    codes, rows = _codes(read), _rows(read)
    parts: dict[str, bytes] = {}

    def others(node: Message) -> Sequence[Node] | None:
        inputs = [name.decode() for name in node.get("input", ())]
        given = {a["name"].decode(): a.get("i", 0) for a in node.get("attribute", ())}
        if node.get("op_type") != b"MatMulNBits" or 4 * given.get("N", 0) * given.get("K", 0) <= most:
            return None
        beside = [name for name in inputs[_CODES + 1 :] if name]  # with so many numbers for each row, all in one axis
        if inputs[_CODES] not in codes or len(inputs) > _CODES + 3 or any(name not in rows for name in beside):
            return None
        size = _TOGETHER * max(1, most // (4 * given["K"] * _TOGETHER))
        cuts = [(start, min(start + size, given["N"])) for start in range(0, given["N"], size)]
        names = [f"{inputs[_CODES]}.{start}" for start, _ in cuts]
        parts.update((n, codes[inputs[_CODES]].part(n, *cut)) for n, cut in zip(names, cuts, strict=True))
        return _in_parts(node, inputs, given, cuts, names, {name: rows[name] for name in beside})

    return with_initializers(with_others(model, others), list(parts.values()))


def _in_parts(
    node: Message, inputs: Sequence[str], given: Mapping[str, int], cuts: Sequence[tuple[int, int]],
    codes: Sequence[str], beside: Mapping[str, int],
) -> list[Node]:  # fmt: skip
    """The nodes that make a product's outputs part by part, and one that puts them together."""
    (output,), domain = [name.decode() for name in node["output"]], node.get("domain", b"").decode()
    made: list[Node] = []
    for name, first in beside.items():
        sizes = np.array([(stop - start) * first // given["N"] for start, stop in cuts], dtype=np.int64)
        made += [
            Node("Constant", [], [f"{output}.{name}.sizes"], {"value": sizes}),
            Node("Split", [name, f"{output}.{name}.sizes"], [f"{output}.{name}.{i}" for i in range(len(cuts))]),
        ]
    for i, (start, stop) in enumerate(cuts):
        own = [f"{output}.{name}.{i}" if name else "" for name in inputs[_CODES + 1 :]]
        attributes = {**given, "N": stop - start}
        made.append(Node("MatMulNBits", [inputs[0], codes[i], *own], [f"{output}.{i}"], attributes, domain))
    return [*made, Node("Concat", [f"{output}.{i}" for i in range(len(cuts))], [output], {"axis": -1})]


def _codes(model: Message) -> dict[str, _Codes]:
    """Weights of the graph that are bytes in a file, by name."""
    places = {tensor.name: tensor for tensor in stored_tensors(model)}
    found = {}
    for tensor in model.get("graph", {}).get("initializer", ()):
        name, dims = tensor.get("name", b"").decode(), tensor.get("dims", ())
        if name in places and len(dims) == 3 and tensor.get("data_type") == ELEMENT_TYPES["uint8"]:
            found[name] = _Codes(places[name], dims)
    return found


def _rows(model: Message) -> dict[str, int]:
    """The first sizes of initializers, and of what is made of them with the same number of rows, by name."""
    tensors = model.get("graph", {}).get("initializer", ())
    found = {t.get("name", b"").decode(): int(t["dims"][0]) for t in tensors if t.get("dims")}
    for node in nodes_of(model):
        source, op = node["input"][0].decode() if node.get("input") else "", node.get("op_type")
        along = any(a["name"] == b"axis" and a.get("i") for a in node.get("attribute", ()))  # not of rows
        if source in found and (op in _ROW_BY_ROW or (op == b"Split" and along)):
            found |= {name.decode(): found[source] for name in node["output"]}
    return found
