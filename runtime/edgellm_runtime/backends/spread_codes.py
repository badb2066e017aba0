"""Codes of 3 bits put in order before ONNX Runtime sees a graph, so that its kernels find them as they read them.

The library would do it by itself, as it folds constants, but it frees nothing of what is made on the way until all is
made: five times what kernels read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import BundleError
from edgellm_runtime.graphs.external_files import StoredTensor, stored_tensors
from edgellm_runtime.graphs.graph_view import GraphView, nodes_as_they_should_be
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.rewriting import with_initializers, with_nodes
from edgellm_runtime.graphs.three_bits import PARTS, spread, whole_codes
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, message, number, text

__all__ = ["SpreadCodes", "spread_codes"]

_MARK = b"BitShift"  # which a graph has that holds codes of 3 bits
_OUTSIDE = 1  # of TensorProto.DataLocation


@dataclass
class SpreadCodes:
    """A graph without the nodes that put codes of 3 bits in order.

    Args:
        graph: the serialized model.
        codes: what these nodes would have made, by name; the graph reads them as initializers that are handed to it.
    """

    graph: bytes
    codes: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    def hand_to(self, options: Any, ort: Any) -> None:
        """Tell a session's options of the codes, which the library copies when it makes the session."""
        options.add_external_initializers(
            list(self.codes), [ort.OrtValue.ortvalue_from_numpy(codes) for codes in self.codes.values()]
        )


def spread_codes(model: bytes, folder: Path, keep: Collection[str] = ()) -> SpreadCodes:
    """A graph and its codes of 3 bits in bytes of two; one that has none stays as it is.

    Args:
        model: the serialized model, checked.
        folder: of the files that it reads.
        keep: names of values that must stay, beside the graph's outputs.
    """
    if _MARK not in model:
        return SpreadCodes(model)
    try:
        with nodes_as_they_should_be():
            return _spread(model, folder, keep)
    except BundleError:  # the library can say which node is not, and why
        return SpreadCodes(model)


def _spread(model: bytes, folder: Path, keep: Collection[str]) -> SpreadCodes:
    found, read = SpreadCodes(model), read_model(model)
    view, places = GraphView(read, keep), {tensor.name: tensor for tensor in stored_tensors(read)}
    gone, sources = set[int](), dict[str, dict[int, tuple[int, ...]]]()
    for place, three in whole_codes(view):
        if three.name in places:
            sources.setdefault(three.name, {})[place] = three.dims
            gone |= three.chain
    if not all(
        view.inner(name, gone) for place in gone.difference(*sources.values()) for name in view.node(place).outputs
    ):
        return found  # what is made on the way is read elsewhere too
    for source, reshapes in sources.items():
        whole = spread(_bytes(folder, places[source]))
        for place, dims in reshapes.items():
            found.codes[view.node(place).outputs[0]] = whole.reshape(dims)
    declared = [_declared(name, codes.shape) for name, codes in found.codes.items()]
    found.graph = with_initializers(with_nodes(model, {place: [] for place in gone}), declared)
    return found


def _bytes(folder: Path, tensor: StoredTensor) -> NDArray[np.uint8]:
    stored = np.fromfile(folder / tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    return stored.reshape(PARTS, -1)


def _declared(name: str, shape: Sequence[int]) -> bytes:
    """An initializer whose numbers are in no file."""
    sizes = b"".join(number(1, size) for size in shape)
    entries = message(13, text(1, "location") + text(2, "codes"))
    return sizes + number(2, ELEMENT_TYPES["uint8"]) + text(8, name) + entries + number(14, _OUTSIDE)
