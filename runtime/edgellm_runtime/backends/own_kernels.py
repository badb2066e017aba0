"""Kernels of edgellm's own, in the place of ONNX Runtime's where the user asked for them and this machine can run them.

They are a package that is installed apart, ``edgellm_kernels``. Its library is the only one that is ever loaded into
ONNX Runtime: no bundle, argument or variable can name a file. A bundle stays as it is; its nodes are given the other
operator while it is loaded, and whatever speaks against that is told in one line, after which ONNX Runtime's own
kernels run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_runtime.errors import first_line
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.rewriting import with_operator
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES

__all__ = ["BLOCKS", "DOMAIN", "INTERFACE", "OP", "OwnKernels", "Unusable", "find", "tell"]

DOMAIN, OP = "edgellm", "MatMul4Bits"
INTERFACE = 1  # of the operators, which the package names too
BLOCKS = (16, 32, 64, 128)
_TOLD: set[str] = set()


class Unusable(Exception):
    """Why the kernels cannot run here; the message has the remedy."""


@dataclass(frozen=True)
class OwnKernels:
    """The kernels, found and tried.

    Args:
        library: the shared library.
        form: what they use of this processor, such as ``avx512-vnni``.
        digest: sha256 of the library.
    """

    library: Path
    form: str
    digest: str

    def add_to(self, options: Any) -> None:
        """Register the operators with a session's options."""
        options.register_custom_ops_library(str(self.library))

    def swapped(self, graph: bytes) -> tuple[bytes, int]:
        """A serialized graph whose products run on these kernels where they can, and how many of them do."""
        constants = _constants(read_model(graph)["graph"])
        return with_operator(graph, lambda node: _fits(node, constants), domain=DOMAIN, op=OP)


def find(ort: Any) -> OwnKernels:
    """The installed kernels, ready to be used.

    Args:
        ort: the onnxruntime package.

    Raises:
        Unusable: there are none, or they do not run here.
    """
    try:
        import edgellm_kernels
    except ImportError as error:
        raise Unusable("edgellm-kernels is not installed (pip install ./kernels in edgellm's sources)") from error
    if edgellm_kernels.INTERFACE != INTERFACE:
        raise Unusable(
            f"edgellm-kernels {edgellm_kernels.__version__} is of interface {edgellm_kernels.INTERFACE}, this edgellm "
            f"of {INTERFACE}; install those of one release"
        )
    try:
        library = edgellm_kernels.library()
        form = str(edgellm_kernels.form())
    except OSError as error:
        raise Unusable(
            f"the library of edgellm-kernels does not load ({first_line(error)}); install it again"
        ) from error
    if not form:
        raise Unusable("edgellm-kernels has no form for this processor, which lacks AVX2 or ARM's dot products")
    found = OwnKernels(library, form, hashlib.sha256(library.read_bytes()).hexdigest())
    try:
        found.add_to(ort.SessionOptions())
    except Exception as error:  # the library's own kinds
        raise Unusable(
            f"ONNX Runtime {ort.__version__} refuses edgellm-kernels ({first_line(error)}); install those that were "
            "built for it"
        ) from error
    return found


def tell(reason: str) -> None:
    """Say once a process that ONNX Runtime's kernels run although others were asked for, and why."""
    if reason not in _TOLD:
        _TOLD.add(reason)
        logging.getLogger(__package__).warning("%s; ONNX Runtime's kernels run instead", reason)


def _constants(graph: Message) -> dict[bytes, int]:
    """Name to number of the dtype, of initializers and of what is cast from one, once, at loading."""
    found = {tensor.get("name", b""): tensor.get("data_type", 0) for tensor in graph.get("initializer", ())}
    for node in graph.get("node", ()):
        if node.get("op_type") == b"Cast" and not node.get("domain") and node["input"][0] in found:
            found[node["output"][0]] = next(a.get("i", 0) for a in node["attribute"] if a.get("name") == b"to")
    return found


def _fits(node: Message, constants: Mapping[bytes, int]) -> bool:
    """Whether a node of a graph is a product that these kernels compute as ONNX Runtime does."""
    if (node.get("op_type"), node.get("domain")) != (b"MatMulNBits", b"com.microsoft"):
        return False
    given = {a.get("name", b""): a.get("i", 0) for a in node.get("attribute", ())}
    if (given.get(b"bits", 4), given.get(b"accuracy_level", 0)) != (4, 4) or given.get(b"block_size") not in BLOCKS:
        return False
    matrix = node.get("input", ())[1:]  # codes, scales, and zeros or none
    expected = [ELEMENT_TYPES[dtype] for dtype in ("uint8", "float32", "uint8")]
    return len(matrix) in (2, 3) and [constants.get(name) for name in matrix] == expected[: len(matrix)]
