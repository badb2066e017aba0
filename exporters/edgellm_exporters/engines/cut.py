"""A bundle of engines cut off behind one of its layers: a bundle whose logits are what that layer gives.

It is steps, state and roles like any other, so that whatever builds and runs a bundle's engines builds and runs those
of the cut one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgellm_exporters.engines.rebuild import same_file
from edgellm_exporters.errors import EngineError
from edgellm_runtime.bundle import MANIFEST, Bundle, FileInfo, Manifest, sha256_of
from edgellm_runtime.checks.layers import LAYER
from edgellm_runtime.spec import Signature, StateSpec, TensorSpec

__all__ = ["cut_behind"]

_POSITIONS, _PRESENT = "logit_positions", "present."


def cut_behind(bundle: Bundle, layer: str, destination: Path) -> Bundle:
    """A bundle of the graphs' nodes up to a layer's output.

    Args:
        bundle: of graphs that engines are built from.
        layer: one that its manifest names.
        destination: a directory that is made. Weights are the bundle's own files under another name.

    Raises:
        EngineError: a graph does not name the layer's output, or that has another shape than (batch, time, features).
    """
    destination.mkdir(parents=True)
    manifest = bundle.manifest
    graphs = {info.file for info in manifest.graphs.values()}
    files, states, width = dict[str, FileInfo](), set[str](), 0
    for name in graphs:
        model = ir.load(bundle.file(name))
        width, kept = _cut(model, layer, manifest.signature.logits, name)
        states |= kept
        ir.save(model, path := destination / name)
        files[name] = FileInfo(path.stat().st_size, sha256_of(path))
    for name, info in manifest.files.items():
        if name not in graphs and name not in manifest.engine_files and name.endswith(".data"):
            same_file(bundle.file(name), destination / name)
            files[name] = info
    cut = _manifest(manifest, width, [s for s in manifest.signature.state if s.present_name in states], files)
    (destination / MANIFEST).write_text(json.dumps(cut.to_json(), allow_nan=False), encoding="utf-8")
    return Bundle(destination, checksums=False)


def _manifest(manifest: Manifest, width: int, state: Sequence[StateSpec], files: dict[str, FileInfo]) -> Manifest:
    logits = manifest.signature.logits
    outputs = (TensorSpec(logits.name, (*logits.shape[:-1], width), logits.dtype),)
    return Manifest(
        name=manifest.name, target=manifest.target,
        signature=Signature(manifest.signature.inputs, outputs, tuple(state)),
        max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks, dtype=manifest.dtype, files=files,
        quantization=manifest.quantization, vocab_size=manifest.vocab_size or manifest.width, graphs=manifest.graphs,
        capacity=manifest.capacity,
    )  # fmt: skip


def _cut(model: ir.Model, layer: str, logits: TensorSpec, file: str) -> tuple[int, set[str]]:
    """Cut a graph in place; the layer's features, and the names of the states that are still given."""
    graph = model.graph
    given = next((v for node in graph for v in node.outputs if v.name == f"{LAYER}{layer}"), None)
    if given is None:
        raise EngineError(f"{file}: does not name the output of {layer}; export the model again")
    width = None if given.shape is None or len(given.shape) != 3 else given.shape[2]
    if not isinstance(width, int):
        raise EngineError(f"{file}: {layer} gives {given.shape} and not (batch, time, features), so it cannot be cut")
    later = _depending_on(given)
    kept = [v for v in graph.outputs if v.name is not None and v.name.startswith(_PRESENT) and v not in later]
    for node in graph:  # another value may not have the name that the new output gets
        for value in node.outputs:
            value.name = f"whole.{value.name}" if value.name == logits.name else value.name
    graph.outputs.clear()
    graph.outputs.extend([_picked(graph, given, logits, width), *kept])
    common.RemoveUnusedNodesPass()(model)
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
    return width, {v.name for v in kept if v.name is not None}


def _depending_on(value: ir.Value) -> set[ir.Value]:
    """All that is computed from a value."""
    found, left = set[ir.Value](), [value]
    while left:
        for node, _ in left.pop().uses():
            fresh = [v for v in node.outputs if v not in found]
            found |= {*fresh}
            left += fresh
    return found


def _picked(graph: ir.Graph, given: ir.Value, logits: TensorSpec, width: int) -> ir.Value:
    """The rows of a value (batch, time, features) at the positions that logits are asked for."""
    dtype = ir.DataType.from_numpy(np.dtype(logits.dtype))
    positions = next((v for v in graph.inputs if v.name == _POSITIONS), None)  # none of a graph of single tokens
    if positions is not None:
        last = ir.tensor([-1], name="cut.axis")
        axis = ir.Value(name=last.name, const_value=last, type=ir.TensorType(last.dtype), shape=ir.Shape([1]))
        graph.register_initializer(axis)
        places = _appended(graph, "cut.places", ir.node("Unsqueeze", [positions, axis]))
        given = _appended(graph, "cut.picked", ir.node("GatherND", [given, places], {"batch_dims": 1}))
    output = _appended(graph, logits.name, ir.node("Cast", [given], {"to": dtype}))
    output.type, output.shape = ir.TensorType(dtype), ir.Shape([*logits.shape[:-1], width])
    return output


def _appended(graph: ir.Graph, name: str, node: ir.Node) -> ir.Value:
    node.outputs[0].name = name
    graph.append(node)
    return node.outputs[0]
