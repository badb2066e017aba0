"""What a bundle's graphs read, held against what its manifest lists, before another parser sees a graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgellm_runtime.bundle.manifest import Manifest
from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.graphs.external_files import StoredTensor, stored_tensors
from edgellm_runtime.graphs.graph_rules import check_interface, check_rules
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.graphs.wire import Message

__all__ = ["read_graph", "weight_files"]

_SPARE_BYTES = 1 << 16  # of a file of weights, after the last tensor: what aligns or fills a page
_MOST_MEMORY = 8  # times the machine's memory that weights may have: they are mapped, and need not all be in it
_MOST_SHARED = 4  # times that the graphs' tensors may take what the files have: graphs of one bundle share weights


def weight_files(path: Path, manifest: Manifest, graphs: Mapping[str, ReadGraph]) -> set[str]:
    """The files that hold the weights of a bundle's graphs, every one listed, as large as the graphs say, nothing else.

    Args:
        path: the bundle's directory.
        manifest: its own; the files have the sizes that it states.
        graphs: by the name of each graph file, what is in it.

    Raises:
        BundleError: a graph reads what it may not, or a file is larger than the weights in it.
    """
    read: dict[str, list[StoredTensor]] = {}
    for name, graph in graphs.items():
        for tensor in _tensors(path / name, graph.model, manifest):
            read.setdefault(tensor.file, []).append(tensor)
    for name, tensors in read.items():
        size, end = manifest.files[name].bytes, max(t.offset + t.nbytes for t in tensors)
        if size > end + _SPARE_BYTES:
            raise BundleError(
                f"{path / name}: {size} bytes, of which the graph reads the first {end}; export the model again"
            )
        if (wanted := sum(t.nbytes for t in tensors)) > _MOST_SHARED * size + _SPARE_BYTES:
            raise BundleError(f"{path / name}: {size} bytes are read as {wanted}; export the model again")
    total, most = sum(manifest.files[name].bytes for name in read), _MOST_MEMORY * _physical_memory()
    if total > most > 0:  # before they are hashed to their end
        raise BundleError(
            f"{path}: weights of {total / 1e9:.0f} GB are more than {_MOST_MEMORY} times this machine's memory; load "
            "it on a larger one"
        )
    return set(read)


def _physical_memory() -> int:
    """Bytes of this machine's memory; 0 where it does not say."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= names.keys():
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_graph(file: Path, data: bytes) -> ReadGraph:
    """A graph file's content, read.

    Raises:
        BundleError: it is no graph.
    """
    try:
        return ReadGraph.of(data)
    except ValueError as error:
        raise _no_graph(file, error) from error


def _no_graph(file: Path, error: ValueError) -> BundleError:
    return BundleError(f"{file}: not an ONNX graph ({first_line(error)}); export the model again")


def _tensors(graph: Path, model: Message, manifest: Manifest) -> list[StoredTensor]:
    """The tensors of one graph that are in files."""
    try:
        tensors = stored_tensors(model)
    except ValueError as error:
        raise _no_graph(graph, error) from error
    wanted = {tensor.file for tensor in tensors}
    if foreign := wanted - manifest.files.keys():
        raise BundleError(f"{graph}: reads {sorted(foreign)}, which the manifest does not list; refusing to follow")
    if other := wanted & manifest.known_files:
        raise BundleError(f"{graph}: reads {sorted(other)} as weights, which are none; export the model again")
    for tensor in tensors:
        if (size := manifest.files[tensor.file].bytes) < tensor.offset + tensor.nbytes:
            raise BundleError(
                f"{graph}: reads {tensor.name!r} up to byte {tensor.offset + tensor.nbytes} of {tensor.file}, which "
                f"has {size}; copy the bundle again"
            )
    try:
        check_rules(model, str(manifest.target["name"]))
        check_interface(model, manifest.signature_of(graph.name))
    except ValueError as error:
        raise BundleError(
            f"{graph}: not a graph for this runtime ({first_line(error)}); export the model again"
        ) from error
    return tensors
