"""Tables of rotary positions are computed when a graph is loaded, from a frequency for each column, and not stored.

Twice 8,192 x 32 numbers are 2.1 MB, which is 3% of a bundle of 70 MB; their 32 frequencies are 128 bytes. ONNX Runtime
folds what reads constants only, so nothing more runs in a step. It costs time of loading and memory (for that table 4
ms and 2.1 MB, docs/benchmark-notes.md), for of a stored table only the rows that are read are in memory. Both grow with
the table, so larger ones stay stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["ComputeTables", "Waves", "waves_of"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_LEAST, _MOST = 1 << 12, 1 << 19  # numbers of a table: smaller ones take no room, larger ones take too long
_TABLES: Mapping[tuple[str, str], tuple[int, int]] = {  # where operators read cosines and sines
    ("com.microsoft", "GroupQueryAttention"): (7, 8), ("", "RotaryEmbedding"): (1, 2),
}  # fmt: skip
# Two steps of float32 about 1, as a part of the amplitude: models round a cosine, then its product with the amplitude.
# ONNX Runtime's own cosine adds one step. A score of queries and keys moves by no more than by sums in another order.
_CLOSE = 2.0**-22
_STEPS = (0, 1, -1, 2, -2, 3, -3)  # of float32, about an estimated frequency
_TRIED = 257  # rows that tell which of them it is


class Waves(NamedTuple):
    """What a pair of tables is: of row p, amplitudes x cos(p x frequencies) and x sin, the angles in float32."""

    frequencies: Floats  # (columns,)
    amplitudes: Floats  # (columns,)


class ComputeTables(ir.passes.InPlacePass):
    """Pairs of tables that are cosines and sines become nodes that compute them.

    Before: a lowered graph in float32, its nodes sorted. After: no table of middle size is stored whose numbers come
    out of frequencies and amplitudes, up to how a cosine is rounded; what reads it reads nodes that read constants.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every such pair, in place."""
        graph = model.graph
        found = [(pair, waves) for pair in _pairs(graph) if (waves := _waves(pair)) is not None]
        first = next(iter(graph), None)
        for (cos, sin), waves in found:
            assert first is not None
            nodes, tables = _computed(graph, cos, waves)
            graph.insert_before(first, nodes)
            for stored, table in zip((cos, sin), tables, strict=True):
                ir.convenience.replace_all_uses_with(stored, table)
                graph.initializers.pop(str(stored.name))
                table.name, table.shape, table.type = stored.name, stored.shape, stored.type
        return ir.passes.PassResult(model, bool(found))


def _pairs(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """The constants that operators read as cosines and sines, each pair once."""
    pairs: dict[tuple[ir.Value, ir.Value], None] = {}
    for node in graph.all_nodes():
        places = _TABLES.get((node.domain, node.op_type))
        if places is None or len(node.inputs) <= max(places):
            continue
        cos, sin = (node.inputs[place] for place in places)
        if cos is not None and sin is not None and all(_is_stored(value, graph) for value in (cos, sin)):
            pairs[cos, sin] = None
    each = [value for pair in pairs for value in pair]
    return [pair for pair in pairs if all(each.count(value) == 1 for value in pair)]


def _is_stored(value: ir.Value, graph: ir.Graph) -> bool:
    tensor = value.const_value
    if tensor is None or value.producer() is not None or graph.initializers.get(str(value.name)) is not value:
        return False
    sizes = tuple(tensor.shape.numpy())
    return tensor.dtype == ir.DataType.FLOAT and len(sizes) == 2 and _LEAST <= math.prod(sizes) <= _MOST


def _waves(pair: tuple[ir.Value, ir.Value]) -> Waves | None:
    cos, sin = (np.asarray(value.const_value.numpy()) for value in pair if value.const_value is not None)
    return waves_of(cos, sin) if cos.shape == sin.shape else None


def waves_of(cos: Floats, sin: Floats) -> Waves | None:
    """The frequencies and amplitudes of two tables, told from their numbers; None where these are something else.

    A frequency is read off the first row, then off rows twice as far each, where an angle tells it twice as exactly.

    Args:
        cos: (positions, columns).
        sin: as ``cos``.
    """
    amplitudes = cos[0]
    if len(cos) < 2 or sin[0].any() or not (amplitudes > 0).all() or not np.isfinite(cos).all():
        return None
    with np.errstate(invalid="ignore"):
        c, s = cos / amplitudes.astype(np.float64), sin / amplitudes.astype(np.float64)
    frequencies, row = np.arctan2(s[1], c[1]), 1
    while (row := 2 * row) < len(cos):
        off = np.arctan2(s[row], c[row]) - row * frequencies
        frequencies += (off - 2 * np.pi * np.round(off / (2 * np.pi))) / row
    rows = np.unique(np.linspace(0, len(cos) - 1, _TRIED).astype(np.int64))
    near = [_stepped(frequencies.astype(np.float32), steps) for steps in _STEPS]
    errors = np.stack([_errors(f, rows, c, s).mean(axis=0) for f in near])
    best = np.stack(near)[errors.argmin(axis=0), np.arange(len(amplitudes))]
    return Waves(best, amplitudes) if (_errors(best, np.arange(len(cos)), c, s) <= _CLOSE).all() else None


def _stepped(numbers: Floats, steps: int) -> Floats:
    """The float32 so many steps above; none below 0 or of those that are not normal."""
    for _ in range(abs(steps)):
        numbers = np.nextafter(numbers, np.float32(math.copysign(math.inf, steps)))
    return np.where(np.abs(numbers) < np.finfo(np.float32).tiny, np.float32(0), numbers)


def _errors(frequencies: Floats, rows: NDArray[np.int64], cos: Doubles, sin: Doubles) -> Doubles:
    """How far tables are from those of some frequencies, (rows, columns)."""
    angles = (rows.astype(np.float32)[:, None] * frequencies).astype(np.float64)  # rounded, as models have them
    found: Doubles = np.maximum(np.abs(np.cos(angles) - cos[rows]), np.abs(np.sin(angles) - sin[rows]))
    return found


def _computed(graph: ir.Graph, cos: ir.Value, waves: Waves) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that compute a pair of tables, and the tables."""
    assert cos.shape is not None
    name, positions = cos.name, int(cos.shape[0])  # type: ignore[arg-type]
    tape = ir.tape.Tape()

    def const(what: str, array: NDArray[np.generic]) -> ir.Value:
        value = ir.Value(
            name=f"{name}.{what}", const_value=ir.tensor(array), shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )  # fmt: skip
        graph.register_initializer(value)
        return value

    ends = [const(what, np.array(number)) for what, number in (("from", 0), ("positions", positions), ("by", 1))]
    rows = tape.op("Cast", [tape.op("Range", ends)], {"to": ir.DataType.FLOAT})  # whole numbers: their count is checked
    column = tape.op("Unsqueeze", [rows, const("axis", np.array([1]))])
    angles = tape.op("Mul", [column, const("frequencies", waves.frequencies)])
    tables = [tape.op(op, [angles]) for op in ("Cos", "Sin")]
    if (waves.amplitudes != 1).any():
        amplitudes = const("amplitudes", waves.amplitudes)
        tables = [tape.op("Mul", [table, amplitudes]) for table in tables]
    return list(tape.nodes), tables
