"""From a method's name to a plan for one captured graph: smoothing, formats, and codes that calibration chose."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from edgellm.ops.schema import views
from edgellm.streaming import Weights
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.calibrate import check_windows, largest_inputs, quantize_in_turn
from edgellm_exporters.quantize.grids import half_precision
from edgellm_exporters.quantize.lossless import smallest_holding
from edgellm_exporters.quantize.methods import Method, fitted
from edgellm_exporters.quantize.named_weights import named_weights
from edgellm_exporters.quantize.plan import ROW, Codes, Plan, Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.smooth import Smoothing, by_part, smooth
from edgellm_exporters.quantize.stored import in_order, kept

__all__ = ["Uses", "make_plan", "plan_of", "schemes_for", "smoothed"]

Progress = Callable[[str, float], None]
_HEADROOM = 1.25  # of a fixed scale: what the text did not show; larger values are cut off
_TOP, _TOP_FLOAT = 127, 448  # of 8-bit codes, whole numbers and floats


class Uses:
    """How a graph reads its matrices, each set by their names.

    ``ends`` are those that are looked up or whose product is an output of the graph, ``multiplied`` those that some op
    multiplies an input with and nothing else, ``products`` those of which that is the only use.

    Args:
        graphs: of canonical ops, after the target's passes; several that share weights count as one.
    """

    def __init__(self, *graphs: ir.Model) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, ir.TensorProtocol] = {}
        self.ends: set[str] = set()
        self.multiplied: set[str] = set()
        otherwise: set[str] = set()
        for view in itertools.chain.from_iterable(views(graph.graph) for graph in graphs):
            for matrix, value in zip(view.op.matrices, view.all(view.op.matrices), strict=True):
                tensor = value.const_value if value is not None else None
                if tensor is None or not value.name or len(tensor.shape) != 2:
                    continue
                self.shapes[value.name], self.tensors[value.name] = tensor.shape.numpy(), tensor
                product = matrix in view.op.products
                (self.multiplied if product else otherwise).add(value.name)
                if matrix in view.op.tables or (product and view.node.outputs[0].is_graph_output()):
                    self.ends.add(value.name)
        self.products = self.multiplied - otherwise


def make_plan(
    method: Method, graph: ir.Model, model: nn.Module, rows: Sequence[Sequence[int]],
    calibration: Sequence[Sequence[int]] = (), progress: Progress = lambda what, share: None,
    weights: Weights | None = None, *, encoder: ir.Model | None = None, layers: Sequence[str] = (),
    scratch: Path | None = None,
) -> Plan:  # fmt: skip
    """The plan that a method makes for captured graphs whose passes are done; smoothing changes the graphs.

    Args:
        method: what to do.
        graph: of canonical ops.
        model: in eval mode; may be on the meta device.
        rows: a few rows of token ids of one length, to see the range of each layer's inputs on.
        calibration: more of them; weights of fewer than 8 bits are then chosen with GPTQ.
        progress: told what is done, and how much of it.
        weights: where the model's parameters are read from, some maybe stored as codes; None: the model's own.
        encoder: the graph that shares the model's weights with it, if there is one.
        layers: paths of the model's layers, see :func:`.calibrate.quantize_in_turn`.
        scratch: a directory for what is computed meanwhile; None for where temporary files are.

    Raises:
        QuantizeError: too little text, codes of which none can be kept, or weights that no format can hold.
    """
    graphs = (graph,) if encoder is None else (graph, encoder)
    if calibration:
        check_windows(calibration)
    uses = Uses(*graphs)
    if method.keep:
        return _keeping(uses, graphs, weights, partial(progress, "looking at weights"), narrow=method.narrow_scales)
    if method.layers is None or method.ends is None:
        return Plan()
    done, seen = Smoothing(), dict[str, NDArray[np.float32]]()
    if method.smooth or method.fixed_inputs:
        seen = largest_inputs(model, calibration or rows, partial(progress, "looking at inputs"), weights)
    if method.smooth:
        for each in graphs:
            smoothed(each, seen, done)
    schemes = schemes_for(method, uses)
    plan = plan_of(schemes, done, model, calibration, progress, weights, layers=layers, scratch=scratch)
    plan.floats = {name: shape for name, shape in uses.shapes.items() if name not in schemes}
    if plan.floats and not schemes:
        name, (_, columns) = next(iter(plan.floats.items()))
        raise QuantizeError(
            f"no weight's rows divide into blocks of {method.layers.block}, such as {name}'s of {columns} weights; "
            "choose another format, or quantize nothing"
        )
    if method.fixed_inputs:
        plan.inputs = _input_scales(schemes, uses, done, seen)
    return plan


def _keeping(
    uses: Uses, graphs: Sequence[ir.Model], weights: object, progress: Callable[[float], None], *, narrow: bool
) -> Plan:  # fmt: skip
    """What is stored as codes keeps them; of the rest, each weight gets the smallest format that holds it."""
    stored = kept(weights, uses.shapes, uses.ends, uses.products)
    if stored.left and not stored.schemes:
        name, why = next(iter(stored.left.items()))
        raise QuantizeError(f"{name} cannot keep its codes: {why}; quantize to none, int8 or int4 instead")
    rest = {name: tensor for name, tensor in uses.tensors.items() if name not in stored.schemes}
    schemes = {**stored.schemes, **smallest_holding(rest, uses.ends, progress, narrow=rest if narrow else ())}
    alone = frozenset(rest) if stored.schemes else frozenset[str]()
    for graph in graphs:
        in_order(graph, stored.orders)
    return Plan(
        schemes, _rounded, by_rows=alone, kept=frozenset(stored.codes), left=stored.left, chosen=stored.codes,
        orders={part: order for name, order in stored.orders.items() for part in parts_of(name)},
    )  # fmt: skip


def _input_scales(
    schemes: Mapping[str, Scheme], uses: Uses, done: Smoothing, seen: Mapping[str, NDArray[np.float32]]
) -> dict[str, np.float32]:
    """The scale of what each product reads, smoothed; not of what is projected to the vocabulary, which stays float."""
    found = {}
    for name, scheme in schemes.items():
        largest = [seen[part] for part in parts_of(name) if part in seen]
        if name in uses.products and name not in uses.ends and largest:
            top = _TOP_FLOAT if scheme.floating else _TOP
            widest = (np.max(largest, axis=0) / done.columns.get(name, np.float32(1))).max()
            found[name] = half_precision(np.array([widest * _HEADROOM / top], dtype=np.float32))[0]
    return found


def smoothed(
    graph: ir.Model, largest: Mapping[str, NDArray[np.float32]], done: Smoothing | None = None
) -> Smoothing:  # fmt: skip
    """Smooth a graph, in place, by what its layers were seen to read: magnitudes by the names of their weights.

    ``done``, where it is given, is added to.
    """
    made = smooth(graph, lambda names: next((largest[n] for n in names if n in largest), None))
    if done is not None:
        done.columns.update(made.columns)
        done.rows.update(made.rows)
    return made


def plan_of(
    schemes: Mapping[str, Scheme], done: Smoothing, model: nn.Module, calibration: Sequence[Sequence[int]],
    progress: Progress, weights: Weights | None = None, *, layers: Sequence[str] = (), scratch: Path | None = None,
) -> Plan:  # fmt: skip
    """A plan for chosen schemes, with codes from GPTQ where there is text and they are few.

    Args:
        schemes: by weight's name.
        done: how the graph was smoothed.
        model: in eval mode; may be on the meta device.
        calibration: windows of token ids of one length, or none.
        progress: told what is done, and how much of it.
        weights: where its parameters are read from; None: its own.
        layers: as for :func:`make_plan`.
        scratch: likewise.
    """
    few = {name: s for name, s in schemes.items() if s.bits < 8 and not s.shifted} if calibration else {}
    chosen: Mapping[str, Codes] = {}
    if few:
        sizes = {name: len(weight) for name, weight in named_weights(model).items()}
        chosen = quantize_in_turn(
            model, calibration, {part: s for name, s in few.items() for part in parts_of(name)},
            {part: f for name, f in done.columns.items() for part in parts_of(name)}, by_part(done.rows, sizes),
            partial(progress, "calibrating"), weights, layers, scratch,
        )  # fmt: skip
    return Plan(schemes, _rounded, done, by_rows=frozenset(schemes), chosen=chosen, calibrated=bool(few))


def schemes_for(method: Method, uses: Uses) -> dict[str, Scheme]:
    """Each matrix's format; integer products are for what is only multiplied with.

    A matrix whose rows divide into no block has none, and stays float.
    """
    assert method.layers is not None and method.ends is not None
    found: dict[str, Scheme] = {}
    for name, (_, columns) in uses.shapes.items():
        scheme = method.ends if name in uses.ends else method.layers
        if scheme.block == ROW and name not in uses.products and (method.integer_products or scheme.floating):
            scheme = Scheme(8, 32) if method.integer_products else Scheme(8, ROW)
        fitting = fitted(scheme, columns, exact=method.exact and name not in uses.ends)
        if fitting is not None:
            found[name] = fitting
    return found


def _rounded(_name: str, weight: NDArray[np.float32], scheme: Scheme) -> Codes:
    return round_to_nearest(weight, scheme)
