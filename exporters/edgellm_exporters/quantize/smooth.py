"""Smoothing: what is large in a layer's inputs moves into its weights, where a block has a scale of its own.

Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438. An input column is divided by a factor where it is made, in the norm's
gain or in the rows of the weight before a gate, and the reading weights' column is multiplied by it: in float, nothing
changes. Factors are powers of two, so not even the rounding does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm.ops.schema import View, view_of, views
from edgellm_exporters.passes.merge_linears import parts_of

__all__ = ["STRENGTH", "Smoothing", "by_part", "scale_vectors", "smooth", "vectors_of"]

STRENGTH = 0.5  # 0 leaves all the range in the inputs, 1 moves all of it into the weights
_LARGEST = 2.0**12  # of a factor: beyond, one side would leave what float16 scales hold
Array = NDArray[Any]


@dataclass
class Smoothing:
    """Factors by the name of a weight: what its columns and its rows were multiplied with."""

    columns: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)

    def scaled(self, name: str, weight: Array) -> Array:
        """A weight with its factors."""
        if name in self.columns:
            weight = weight * self.columns[name]
        if name in self.rows:
            weight = weight * self.rows[name][:, None]
        return weight

    def unscaled(self, name: str, weight: Array) -> Array:
        """The inverse of :meth:`scaled`."""
        if name in self.columns:
            weight = weight / self.columns[name]
        if name in self.rows:
            weight = weight / self.rows[name][:, None]
        return weight


def smooth(
    graph: ir.Model, largest: Callable[[Sequence[str]], Array | None], strength: float = STRENGTH
) -> Smoothing:  # fmt: skip
    """Smooth every input that a gain or a weight alone makes. In place.

    Args:
        graph: of canonical ops, after the target's passes. Weights that are read twice stay as they are.
        largest: from the names of the weights that read an input, merged ones apart, to the largest magnitude seen in
            each of its columns; None where nothing is known.
        strength: see :data:`STRENGTH`.

    Returns:
        What was done, by the weights' names in the graph.
    """
    done = Smoothing()
    readers: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    nodes: dict[ir.Value, set[ir.Node]] = defaultdict(set)
    for view in views(graph.graph):
        for matrix, read in view.op.products.items():
            if (weight := getattr(view, matrix)) is not None:
                readers[getattr(view, read)].append(weight)
                nodes[getattr(view, read)].add(view.node)
    for x, weights in readers.items():
        seen = largest([part for w in weights for part in parts_of(str(w.name))])
        maker = _maker(x)
        if seen is None or maker is None or len(x.uses()) != len(nodes[x]) or not all(map(_own, weights)):
            continue
        factors = _factors(seen, [_array(w) for w in weights], strength)
        maker(1 / factors, done)
        for weight in weights:
            _multiply(weight, factors, done.columns, factors)
    return done


def vectors_of(graphs: Sequence[ir.Model], shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    """Those of a model's vectors that its graphs have as they are, so that factors on them reach what is computed.

    Args:
        graphs: of canonical ops.
        shapes: of the model's parameters.
    """
    found = {name for name, shape in shapes.items() if len(shape) == 1}
    for graph in graphs:
        there = graph.graph.initializers
        found -= {n for n in found if n in there and not _same(there[n], shapes[n])}
    used = {n for n in found for g in graphs if n in g.graph.initializers and g.graph.initializers[n].uses()}
    return frozenset(used)


def _same(value: ir.Value, shape: Sequence[int]) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and list(tensor.shape.numpy()) == list(shape)


def scale_vectors(graphs: Sequence[ir.Model], factors: Mapping[str, Array]) -> None:
    """Multiply vectors of graphs, in place.

    Args:
        graphs: of canonical ops.
        factors: by name, of those that :func:`vectors_of` gives.
    """
    for graph in graphs:
        for name in factors.keys() & graph.graph.initializers.keys():
            _scale(graph.graph.initializers[name], factors[name])


def _factors(seen: Array, weights: Sequence[Array], strength: float) -> Array:
    weight = np.max([np.abs(w).max(0) for w in weights], axis=0)
    alive = (seen > 0) & (weight > 0)
    seen, weight = np.where(alive, seen, 1), np.where(alive, weight, 1)
    logs = strength * np.log2(seen) - (1 - strength) * np.log2(weight)
    logs = np.where(alive, logs - logs[alive].mean() if alive.any() else 0, 0)
    limit = np.log2(_LARGEST)
    factors: Array = np.exp2(np.clip(np.rint(logs), -limit, limit)).astype(np.float32)
    return factors


Maker = Callable[[Array, Smoothing], None]


def _maker(x: ir.Value) -> Maker | None:
    """What scales the columns of a value by scaling weights, or None."""
    node = x.producer()
    view = view_of(node)
    if view is not None and not view.op.matrices:  # a gain; a matrix is scaled where one more product follows it
        return _scaling(view, x, slice(None))
    if node is not None and node.op_type == "Mul" and node.domain == "":
        return next((m for m in map(_factor_maker, node.inputs) if m is not None), None)
    return None


def _factor_maker(factor: ir.Value | None) -> Maker | None:
    """One side of a product that is some columns of what an op makes, and goes nowhere else."""
    node = factor.producer() if factor is not None else None
    if factor is None or node is None or len(factor.uses()) != 1:
        return None
    whole, start, size = factor, 0, None
    if node.op_type == "Split" and node.domain == "" and node.inputs[0] is not None and node.inputs[1] is not None:
        sizes, index = _array(node.inputs[1]).tolist(), factor.index() or 0
        whole, start, size = node.inputs[0], sum(sizes[:index]), sizes[index]
        if len(whole.uses()) != 1:
            return None
    view = view_of(whole.producer())
    return None if view is None else _scaling(view, whole, slice(start, None if size is None else start + size))


def _scaling(view: View, output: ir.Value, columns: slice) -> Maker | None:
    """What scales some columns of an output by scaling the inputs that its op says it is scaled by."""
    names = view.op.scaled_by.get(view.name_of(output), ())
    values = {name: getattr(view, name) for name in names if getattr(view, name) is not None}
    if not values or not all(map(_own, values.values())):
        return None
    total = next(iter(values.values())).const_value.shape.numpy()[0]

    def make(factors: Array, done: Smoothing) -> None:
        rows = np.ones(total, dtype=np.float32)
        rows[columns] = factors
        for name, value in values.items():
            if name in view.op.matrices:
                _multiply(value, rows[:, None], done.rows, rows)
            else:
                _scale(value, rows)

    return make


def _multiply(weight: ir.Value, by: Array, into: dict[str, Array], factors: Array) -> None:
    name = str(weight.name)
    _scale(weight, by)
    into[name] = into[name] * factors if name in into else factors


def _scale(value: ir.Value | None, by: Array) -> None:
    assert value is not None and value.const_value is not None
    tensor = value.const_value
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.asarray(tensor.numpy() * by.astype(tensor.dtype.numpy()))), dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()), name=value.name,
    )  # fmt: skip


def _own(value: ir.Value | None) -> bool:
    """Whether a weight is read by one node alone; a bias that is not there is."""
    return value is None or (value.const_value is not None and len(value.uses()) == 1)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def by_part(factors: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Rows' factors of merged weights, cut into those of the weights that were merged.

    A merged weight with a part that the forward computes, whose size no model tells, is left out.
    """
    found: dict[str, Array] = {}
    for name, rows in factors.items():
        start, parts = 0, parts_of(name)
        for part in parts if all(part in sizes for part in parts) else ():
            found[part] = rows[start : start + sizes[part]]
            start += sizes[part]
    return found
