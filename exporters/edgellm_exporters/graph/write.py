"""Writing a lowered graph: the structure in ``model.onnx``, the weights beside it, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from edgellm_exporters.lowering.context import CONSTANT
from edgellm_exporters.quantize.plan import STORAGE

__all__ = [
    "ENCODER_FILE",
    "GRAPH_FILE",
    "WEIGHTS_FILE",
    "Progress",
    "with_own_constants",
    "write_graph",
    "write_graphs",
]

GRAPH_FILE, ENCODER_FILE, WEIGHTS_FILE = "model.onnx", "encoder.onnx", "model.onnx.data"
Progress = Callable[[str, float], None]  # what is being done, and how much of it (0 to 1)
_ALIGNMENT = 64
_INLINE_BYTES = 1024
_APART = "encoder/"


def write_graph(model: ir.Model, directory: Path, progress: Progress) -> None:
    """Write a model with its larger weights in a file of their own; arguments as :func:`write_graphs`."""
    write_graphs({GRAPH_FILE: model}, directory, progress)


def write_graphs(
    models: Mapping[str, ir.Model], directory: Path, progress: Progress, *, weights: str = WEIGHTS_FILE
) -> None:
    """Write models whose weights of one name are the same, each once, into one file beside them.

    Args:
        models: file name to model, whose initializers are replaced by references into the file of weights.
        directory: where; it exists.
        progress: told after each tensor.
        weights: the name of that file.
    """
    every = [(f, v, v.const_value) for f, m in models.items() for v in m.graph.initializers.values()]
    total, done = sum(tensor.nbytes for _, _, tensor in every if tensor is not None), 0
    stored: dict[str, int] = {}
    with (directory / weights).open("wb") as file:
        for graph, value, tensor in every:
            assert tensor is not None
            if tensor.nbytes >= _INLINE_BYTES:
                storage = tensor.metadata_props.get(STORAGE) or _own_name(graph, value)
                if storage not in stored:
                    stored[storage] = file.seek(-file.tell() % _ALIGNMENT, 1)
                    _write(tensor, file)
                value.const_value = _reference(value, tensor, stored[storage], directory / weights)
            elif isinstance(tensor, ir.LazyTensor):
                value.const_value = _read(value, tensor)
            done += tensor.nbytes
            progress("writing weights", done / total)
        file.truncate()
    for name, model in models.items():
        ir.save(model, directory / name)


def with_own_constants(encoder: ir.Model) -> None:
    """Names for an encoder's constants that no other graph, traced apart, has: what has one name is stored once.

    Weights, which are read when they are written, keep theirs. In place, before lowering, which narrows both alike.
    """
    for value in list(encoder.graph.initializers.values()):
        if not isinstance(value.const_value, ir.LazyTensor):
            value.name = f"{_APART}{value.name}"


def _own_name(graph: str, value: ir.Value) -> str:
    """A weight's name; of a constant that lowering numbered, one that no other graph's has."""
    return f"{graph}/{value.name}" if str(value.name).startswith(CONSTANT) else str(value.name)


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    if tensor.dtype.bitwidth < 8:  # numpy gives each element a byte
        file.write(tensor.tobytes())
    else:
        np.ascontiguousarray(tensor.numpy()).tofile(file)


def _read(value: ir.Value, tensor: ir.LazyTensor) -> ir.TensorProtocol:
    """A small tensor, read now: within onnx_ir's serialization its faults would come out as errors of that."""
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "")


def _reference(value: ir.Value, tensor: ir.TensorProtocol, offset: int, file: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        file.name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
        base_dir=file.parent,
    )  # fmt: skip
