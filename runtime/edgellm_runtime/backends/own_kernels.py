"""Kernels of edgellm's own, in the place of ONNX Runtime's where the user asked for them and this machine can run them.

They are a package that is installed apart, ``edgellm_kernels``. Its library is the only one that is ever loaded into
ONNX Runtime: no bundle, argument or variable can name a file. A bundle stays as it is; its nodes are given the other
operator while it is loaded, and whatever speaks against that is told in one line, after which ONNX Runtime's own
kernels run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.graphs.writer import Node

__all__ = ["INTERFACE", "OwnKernels", "Unusable", "find", "tell"]

INTERFACE = 5  # of the operators, which the package names too
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

    def swapped(self, graph: bytes | ReadGraph, keep: Collection[str] = ()) -> tuple[bytes, tuple[Node, ...]]:
        """A serialized graph that runs on these kernels where they compute what its nodes do.

        Args:
            graph: of a bundle, checked; read, where it has been read already.
            keep: names of values that must stay, beside the graph's outputs.

        Returns:
            The graph, and its nodes of edgellm's own operators.

        Raises:
            Unusable: the graph has a node that is none of its operator.
        """
        read = ReadGraph.of(graph) if isinstance(graph, bytes) else graph
        try:
            return with_own_operators(read, keep)
        except BundleError as error:  # ONNX Runtime, which checks every node, can say which and why
            raise Unusable("a node of the graph has other inputs than its operator") from error


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
