"""The codes that a checkpoint stores, as they are, in a format that kernels hold.

A kernel's blocks may be smaller than the checkpoint's groups, whose scale they then share, and its codes may have more
bits: the numbers that they stand for stay the same, but for scales, which are kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm.codes import CodedWeights, CodeFormat, StoredCodes
from edgellm.ops.schema import views
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.plan import Codes, Scheme

__all__ = ["Kept", "KeptCodes", "in_order", "in_scheme", "kept", "scheme_holding"]

Order: TypeAlias = NDArray[np.int64]
_BLOCKS = (256, 128, 64, 32, 16)
_TWO_BIT_BLOCKS = (128, 64, 32)  # those that kernels have
_ROUNDING, _SMALLEST = 2.0**-10, 2.0**-24  # of scales in 16 bits


@dataclass
class Kept:
    """Which of a graph's weights keep their codes.

    Args:
        schemes: by the names of the graph's weights.
        codes: by the names of the weights that were merged into them.
        left: stored as codes that cannot be kept, with the reasons; by the graph's names.
        orders: in which the columns of a graph's weight form groups, where they do not as they are.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    codes: Mapping[str, Codes] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)


def kept(weights: object, shapes: Mapping[str, tuple[int, int]], ends: set[str], products: Collection[str]) -> Kept:
    """Find the weights of a graph that are stored as codes and can stay so.

    Args:
        weights: where the model's parameters are read from.
        shapes: of the graph's matrices, by name.
        ends: those whose rows are looked up, which fewer formats can be.
        products: those that are multiplied with and nothing else, whose columns may be put into another order.
    """
    if not isinstance(weights, CodedWeights):
        return Kept()
    found, schemes = Kept(), dict[str, Scheme]()
    for name, (_, columns) in shapes.items():
        parts = parts_of(name)
        formats = [weights.code_format(part) for part in parts]
        stored = [form for form in formats if form is not None]
        if not stored:
            continue
        scheme = _common(stored, columns, looked_up=name in ends)
        order = _order(stored, columns) if name in products else "its groups are no neighbours, and rows are looked up"
        if len(stored) < len(parts):
            found.left[name] = "a part of it is stored as floats"
        elif isinstance(scheme, str):
            found.left[name] = scheme
        elif isinstance(order, str) and any(not form.ordered for form in stored):
            found.left[name] = order
        else:
            found.schemes[name] = scheme
            schemes |= dict.fromkeys(parts, scheme)
            if isinstance(order, np.ndarray):
                found.orders[name] = order
    by_part = {part: order for name, order in found.orders.items() for part in parts_of(name)}
    found.codes = KeptCodes(weights, schemes, by_part)
    return found


def _order(formats: Sequence[CodeFormat], columns: int) -> Order | str | None:
    """In which order of columns the groups of all are neighbours; None for the one there is, or why there is none."""
    groups = formats[0].groups
    if all(form.ordered for form in formats):
        return None
    if groups is None or any(form.groups is None or not np.array_equal(groups, form.groups) for form in formats):
        return "weights that read one input have groups (g_idx) of different columns"
    if (np.bincount(groups, minlength=columns // formats[0].group) != formats[0].group).any():
        return "its groups (g_idx) are of unequal sizes"
    return np.argsort(groups, kind="stable")


def _common(formats: Sequence[CodeFormat], columns: int, *, looked_up: bool) -> Scheme | str:
    """The one format that holds all of these, or why there is none."""
    schemes = [scheme_holding(form, columns, looked_up=looked_up) for form in formats]
    if reasons := [scheme for scheme in schemes if isinstance(scheme, str)]:
        return reasons[0]
    whole = [scheme for scheme in schemes if isinstance(scheme, Scheme)]
    bits, block = max(s.bits for s in whole), min(s.block for s in whole)
    return Scheme(bits, block, symmetric=all(s.symmetric for s in whole))


def scheme_holding(form: CodeFormat, columns: int, *, looked_up: bool = False) -> Scheme | str:
    """The format of a kernel that holds such codes, or why there is none.

    Args:
        form: how they are stored.
        columns: of the weight.
        looked_up: whether its rows are looked up.
    """
    bits = next(bits for bits in (2, 4, 8) if bits >= form.bits)
    blocks = [block for block in _BLOCKS if form.group % block == 0 and columns % block == 0]
    if bits == 2 and (looked_up or not set(blocks) & set(_TWO_BIT_BLOCKS)):
        bits = 4
    block = next((block for block in blocks if bits > 2 or block in _TWO_BIT_BLOCKS), None)
    if block is None:
        return f"groups of {form.group} in rows of {columns}, and kernels hold multiples of {_BLOCKS[-1]}"
    return Scheme(bits, block, symmetric=form.symmetric)


class KeptCodes(Mapping[str, Codes]):
    """The codes of weights, each read when it is asked for.

    Args:
        weights: where they are.
        schemes: by weight's name, what each is to be held in.
        orders: of the columns of some.
    """

    def __init__(self, weights: CodedWeights, schemes: Mapping[str, Scheme], orders: Mapping[str, Order]) -> None:
        self._weights, self._schemes, self._orders = weights, schemes, orders

    def __getitem__(self, name: str) -> Codes:
        return in_scheme(self._weights.codes(name), self._schemes[name], self._orders.get(name))

    def __contains__(self, name: object) -> bool:
        return name in self._schemes

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)


def in_scheme(stored: StoredCodes, scheme: Scheme, order: Order | None = None) -> Codes:
    """Stored codes in a format of as many bits or more and of blocks that divide their groups.

    A symmetric format has its zero at the middle code: the codes of one with fewer bits move there.

    Args:
        stored: the checkpoint's.
        scheme: the format.
        order: in which the columns are to stand; None: as they do.
    """
    codes, zeros, columns = stored.codes, stored.zeros, stored.codes.shape[1]
    if order is not None:
        codes = codes[:, order]
    if scheme.symmetric and (move := scheme.middle - 2 ** (stored.format.bits - 1)):
        codes, zeros = codes + np.uint8(move), zeros + np.uint8(move)
    group = np.arange(0, columns, scheme.block) // stored.format.group  # of each block
    with np.errstate(over="ignore"):
        scales = stored.scales.astype(np.float16).astype(np.float32)
    if not np.allclose(scales, stored.scales, rtol=_ROUNDING, atol=_SMALLEST):
        worst = float(np.abs(stored.scales).max())
        raise QuantizeError(f"scales of up to {worst:g} are no numbers of 16 bits; quantize to none or int8 instead")
    return Codes(codes, np.ascontiguousarray(scales[:, group]), np.ascontiguousarray(zeros[:, group]))


def in_order(graph: ir.Model, orders: Mapping[str, Order]) -> None:
    """Put the columns of weights into another order, and with them what is multiplied with them. In place.

    Args:
        graph: of canonical ops.
        orders: by weight's name; each is only multiplied with.
    """
    made: dict[tuple[ir.Value, bytes], ir.Value] = {}
    done = set[str]()
    for view in list(views(graph.graph)):
        for matrix, read in view.op.products.items():
            weight, x = getattr(view, matrix), getattr(view, read)
            order = orders.get(str(weight.name)) if weight is not None else None
            if order is None:
                continue
            key = (x, order.tobytes())
            if key not in made:
                made[key] = _gathered(graph.graph, view.node, x, order, f"{weight.name}.order")
            view.node.replace_input_with(view.node.inputs.index(x), made[key])
            if str(weight.name) not in done:
                _reorder(weight, order)
                done.add(str(weight.name))


def _gathered(graph: ir.Graph, before: ir.Node, x: ir.Value, order: Order, name: str) -> ir.Value:
    indices = ir.Value(
        name=name, const_value=ir.tensor(order), shape=ir.Shape([len(order)]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.register_initializer(indices)
    node = ir.node("Gather", [x, indices], attributes={"axis": -1})
    node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    graph.insert_before(before, node)
    return node.outputs[0]


def _reorder(weight: ir.Value, order: Order) -> None:
    tensor = weight.const_value
    assert tensor is not None
    weight.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy()[:, order])), dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()), name=weight.name,
    )  # fmt: skip
