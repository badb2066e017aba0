"""The nodes of a graph that one of edgellm's own operators stands for, and the graph with that operator there.

Every rule begins at a product with quantized weights and looks at what its input is made from and what its result
becomes. A value that anything else needs stays where it is. What no rule knows stays as it is, so that a graph always
has a meaning; the numbers differ from those of the nodes by the order of sums, as ``kernels/src`` states them, and over
a cache of float16 in that a step's own keys and values are rounded to it before they are attended to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose

from edgellm_runtime.graphs.graph_view import GraphView, nodes_as_they_should_be
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.graphs.own_attention import DOMAIN, own_attention
from edgellm_runtime.graphs.own_experts import GatedProducts, own_experts
from edgellm_runtime.graphs.own_gather import gather_chain, own_gather
from edgellm_runtime.graphs.rewriting import with_nodes
from edgellm_runtime.graphs.stored_weights import made_weights, stored_weights
from edgellm_runtime.graphs.writer import Attribute, Node

__all__ = ["BITS", "BLOCKS", "DOMAIN", "OPERATORS", "UNIT", "with_own_operators"]

OPERATORS = ("BlockProduct", "NormProduct", "GatedMlp", "NormGatedMlp")  # those that begin with a product or its norm
BITS, BLOCKS = (2, 4, 8), (16, 32, 64, 128)
UNIT = 32  # outputs that are computed together
_LIBRARY = "com.microsoft"
_LONGEST_ROW, _ROW_STEP = 65536, 16
_LARGEST_CODE, _MIDDLE = 127, 128


@dataclass(frozen=True)
class _Product:
    """A product with a matrix of codes.

    Args:
        place: of the node that gives its result.
        reads: the value that it reads.
        gives: its result.
        constants: names of codes, scales and zeros, the last empty where there are none.
        sizes: attributes, but for ``zeros``.
        chain: places of nodes that it stands for.
    """

    place: int
    reads: str
    gives: str
    constants: tuple[str, str, str]
    sizes: Mapping[str, int]
    chain: frozenset[int]

    def attributes(self, suffix: str = "") -> dict[str, int]:
        return {f"{name}{suffix}": size for name, size in {**self.sizes, "zeros": int(bool(self.constants[2]))}.items()}


@dataclass(frozen=True)
class _Operation:
    """What becomes one node.

    Args:
        first: the product that reads.
        last: the one that gives, the same or that after a gate.
        chain: places of nodes that it stands for, beside the products'.
        norm: inputs and the sum's name of a norm before it.
        epsilon: of the norm.
    """

    first: _Product
    last: _Product
    chain: frozenset[int] = frozenset()
    norm: Sequence[str] = ()
    epsilon: float = 0.0
    gone: frozenset[int] = field(default=frozenset())

    @property
    def gated(self) -> bool:
        return self.first is not self.last

    @property
    def covers(self) -> frozenset[int]:
        return self.chain | self.first.chain | self.last.chain

    def node(self, name: str) -> Node:
        attributes: dict[str, Attribute] = {**self.first.attributes()}
        inputs = [self.first.reads, *self.first.constants]
        outputs = [self.last.gives]
        if self.norm:
            x, skip, gamma, total = self.norm
            inputs[:1] = [x, skip, gamma]
            outputs.append(total)
            attributes["epsilon"] = self.epsilon
        if self.gated:
            inputs += self.last.constants
            attributes |= self.last.attributes("_down")
        while not inputs[-1]:
            inputs.pop()
        op = OPERATORS[2 * self.gated + bool(self.norm)]
        return Node(op, inputs, outputs, attributes, domain=DOMAIN, name=name)


def with_own_operators(graph: bytes | ReadGraph, keep: Collection[str] = ()) -> tuple[bytes, tuple[Node, ...]]:
    """A serialized model with edgellm's own operators wherever they compute what its nodes do.

    Nodes within loops and branches are left alone, but for those of experts.

    Args:
        graph: the serialized model; read, where it has been read already.
        keep: names of values that must stay, beside the graph's outputs.

    Returns:
        The model, and the nodes that are new in it.

    Raises:
        BundleError: a node has other inputs or outputs than its operator.
    """
    read = ReadGraph.of(graph) if isinstance(graph, bytes) else graph
    with nodes_as_they_should_be():
        return _swapped(read, keep)


def _swapped(read: ReadGraph, keep: Collection[str]) -> tuple[bytes, tuple[Node, ...]]:
    view = GraphView(read.model, keep)
    view.constants |= dict(made_weights(view))
    operations = list(_operations(view))
    there: dict[int, list[Node]] = {operation.last.place: [operation.node(view.node(operation.last.place).name)]
                                    for operation in operations}  # fmt: skip
    mixtures = own_experts(view, _branch_mlp)
    for mixture in mixtures:
        there |= {place: [] for place in mixture.places} | {mixture.places[-1]: [mixture.node]}
    before = {place for each in operations for place in each.covers} | {p for each in mixtures for p in each.chain}
    for place in range(len(view.nodes)):
        if (attention := own_attention(view, place)) is not None:
            there |= {place: [attention.node], **{after: [] for after in attention.after}}
            before |= attention.covers
        elif operations and (gather := own_gather(view, place)) is not None:
            there[place] = [gather]
            before |= gather_chain(view, place)
    needed = {name for nodes in there.values() for node in nodes for name in node.inputs}
    gone = {*there, *(place for operation in operations for place in operation.gone)}
    for place in _unread(view, gone, before - gone, needed):
        there.setdefault(place, [])
    return with_nodes(read.data, there), tuple(node for nodes in there.values() for node in nodes)


def _unread(view: GraphView, gone: set[int], waiting: set[int], needed: Collection[str]) -> set[int]:
    """The places of nodes that are gone, and of those among the waiting ones that nothing needs then: the last first,
    for what a node makes is read after it.

    Args:
        view: the graph.
        gone: places that others have taken.
        waiting: places of nodes that these stand for.
        needed: values that they read.
    """
    for place in sorted(waiting, reverse=True):
        if all(name not in needed and view.inner(name, gone) for name in view.node(place).outputs if name):
            gone.add(place)
    return gone


def _operations(view: GraphView) -> Iterator[_Operation]:
    products = {}
    for place in range(len(view.nodes)):
        found = _block_product(view, place) or _row_product(view, place)
        if found is not None:
            products[found.gives] = found
    reads = Counter(product.reads for product in products.values())
    taken = set()
    for product in products.values():
        gated = _gated(view, product, products)
        if gated is not None and reads[gated.last.reads] == 1:
            taken |= {product.gives, gated.last.gives}
            yield _normed(view, gated, reads)
    for product in products.values():
        if product.gives not in taken:
            yield _normed(view, _Operation(product, product), reads)


def _branch_mlp(view: GraphView) -> GatedProducts | None:
    """The gated MLP of a branch, if it has one and no other product."""
    found = list(_operations(view))
    if len(found) != 1 or not found[0].gated or found[0].norm:
        return None
    (mlp,) = found
    attributes = {**mlp.first.attributes(), **mlp.last.attributes("_down")}
    return GatedProducts(mlp.first.reads, mlp.last.gives, (*mlp.first.constants, *mlp.last.constants), attributes)


def _block_product(view: GraphView, place: int) -> _Product | None:
    """A MatMulNBits that rounds its inputs to 8 bits."""
    node = view.node(place)
    if (node.op, view.domain(place)) != ("MatMulNBits", _LIBRARY):
        return None
    given, matrix = node.numbers, node.inputs[1:]  # codes, scales, and zeros or none
    bits, block, width = given.get("bits", 4), given.get("block_size"), given.get("K", 0)
    if bits not in BITS or block not in BLOCKS or given.get("accuracy_level", 0) != 4 or len(matrix) not in (2, 3):
        return None
    constants = [view.constants.get(name) for name in matrix]
    if [c and c.dtype for c in constants] != ["uint8", "float32", "uint8"][: len(matrix)]:
        return None
    outputs, columns = given.get("N", 0), -(-width // int(block)) * int(block)
    if constants[0] is None or 8 * constants[0].size != outputs * columns * bits:
        return None
    codes, scales, zeros = (*matrix, "")[:3]
    stored = stored_weights(view, codes, scales)
    sizes = {"N": outputs, "K": width, "bits": bits, "block_size": int(block), "sums": 0, **stored.said}
    constant_names = (stored.codes, stored.scales, zeros)
    product = _Product(place, node.inputs[0], node.outputs[0], constant_names, sizes, stored.chain | {place})
    return _with_sums(view, product)


def _with_sums(view: GraphView, product: _Product) -> _Product:
    """A product that reads a row and the sums of its blocks as one that reads the row."""
    concat = view.made_by(product.reads, "Concat")
    if concat is None or view.node(concat).numbers.get("axis") != -1 or len(view.node(concat).inputs) != 2:
        return product
    row, sums = view.node(concat).inputs
    reduce = view.made_by(sums, "ReduceSum")
    if reduce is None or not _along_rows(view, reduce, keep=0):
        return product
    reshape = view.made_by(view.node(reduce).inputs[0], "Reshape")
    if reshape is None or view.node(reshape).inputs[0] != row or view.node(reshape).numbers.get("allowzero", 0):
        return product
    shape = view.numbers(view.node(reshape).inputs[1])
    if shape is None or len(shape) < 3 or any(shape[:-2]):
        return product
    count, block = int(shape[-2]), int(shape[-1])
    if count < 1 or block < 1 or count * block + count != product.sizes["K"]:
        return product
    chain = product.chain | {concat, reduce, reshape}
    return replace(product, reads=row, sizes={**product.sizes, "sums": block}, chain=chain)


def _along_rows(view: GraphView, place: int, *, keep: int) -> bool:
    """Whether a reduction is along the last axis."""
    node = view.node(place)
    axes = view.numbers(node.inputs[1]) if len(node.inputs) == 2 else None
    return axes == (-1,) and node.numbers.get("keepdims", 1) == keep


def _row_product(view: GraphView, place: int) -> _Product | None:
    """A MatMulIntegerToFloat whose rows are rounded to 8 bits before it and given their scales after it."""
    node = view.node(place)
    if (node.op, view.domain(place)) != ("MatMulIntegerToFloat", _LIBRARY) or len(node.inputs) != 5:
        return None
    rounded, codes, one, scales, middle = node.inputs
    matrix, scale = view.constants.get(codes), view.constants.get(scales)
    if matrix is None or scale is None or matrix.dims is None or len(matrix.dims) != 2:
        return None
    (inputs, outputs), made = matrix.dims, node.outputs[0]
    fits = inputs % _ROW_STEP == 0 and 0 < inputs <= _LONGEST_ROW and scale.size == outputs
    if not fits or (matrix.dtype, scale.dtype) != ("int8", "float32"):
        return None
    if view.numbers(one) != (1,) or view.numbers(middle) != (_MIDDLE,) or len(view.readers(made)) != 1:
        return None
    (after,) = view.readers(made)
    quantize = view.made_by(rounded, "QuantizeLinear")
    if quantize is None or view.node(after).op != "Mul" or len(view.node(quantize).inputs) != 3:
        return None
    row, row_scale, zero = view.node(quantize).inputs
    chain = _row_scale(view, row, row_scale, zero)
    if not chain or view.node(quantize).numbers.get("block_size") != inputs:
        return None
    if sorted(view.node(after).inputs) != sorted([made, row_scale]) or not view.inner(made, [after]):
        return None
    sizes = {"N": outputs, "K": inputs, "bits": 8, "block_size": 0, "sums": 0}
    scales, cast = view.uncast(scales)
    chain |= {place, after, quantize, *cast}
    return _Product(after, row, view.node(after).outputs[0], (codes, scales, ""), sizes, frozenset(chain))


def _row_scale(view: GraphView, row: str, scale: str, zero: str) -> set[int]:
    """The nodes that make a row's scale, its largest magnitude by 127, and its zero of 128; none if it is not that."""
    times = view.made_by(scale, "Mul")
    constant = view.made_by(zero, "ConstantOfShape")
    if times is None or constant is None or view.tensor_attribute(constant, "value") != bytes([_MIDDLE]):
        return set()
    shape = view.made_by(view.node(constant).inputs[0], "Shape")
    top, part = view.node(times).inputs
    part_value = view.numbers(part)
    largest = view.made_by(top, "Max")
    if shape is None or largest is None or part_value is None or len(part_value) != 1:
        return set()
    if not isclose(part_value[0], 1 / _LARGEST_CODE, rel_tol=1e-6) or len(view.node(largest).inputs) != 2:
        return set()
    most, least = view.node(largest).inputs
    above, negated = view.made_by(most, "ReduceMax"), view.made_by(least, "Neg")
    below = None if negated is None else view.made_by(view.node(negated).inputs[0], "ReduceMin")
    if above is None or negated is None or below is None:
        return set()
    for reduction in (above, below):
        if view.node(reduction).inputs[0] != row or not _along_rows(view, reduction, keep=1):
            return set()
    return {times, constant, shape, largest, above, negated, below}


def _gated(view: GraphView, first: _Product, products: Mapping[str, _Product]) -> _Operation | None:
    """A product whose halves are multiplied, the first through SiLU, and the product that reads what comes of it."""
    split = view.only_reader(first.gives, "Split")
    half = first.sizes["N"] // 2
    if split is None or first.sizes["N"] % (2 * UNIT) or view.node(split).numbers.get("axis") != -1:
        return None
    parts = view.node(split)
    sizes = view.numbers(parts.inputs[1]) if len(parts.inputs) == 2 else (half,) * len(parts.outputs)
    if sizes != (half, half) or len(parts.outputs) != 2:
        return None
    gate, up = parts.outputs
    sigmoids = [place for place in view.readers(gate) if view.node(place).op == "Sigmoid"]
    if len(sigmoids) != 1:
        return None
    silu = _times(view, view.node(sigmoids[0]).outputs[0], gate)
    both = None if silu is None else _times(view, view.node(silu).outputs[0], up)
    if silu is None or both is None or not view.inner(gate, [sigmoids[0], silu]) or not view.inner(up, [both]):
        return None
    result = view.node(both).outputs[0]
    last = next((product for product in products.values() if product.reads == result), None)
    if last is None or not view.inner(result, last.chain) or _width(last) != half:
        return None
    return _Operation(first, last, frozenset([split, sigmoids[0], silu, both]))


def _width(product: _Product) -> int:
    """How many numbers a product reads of a row."""
    sums = product.sizes["sums"]
    return product.sizes["K"] * sums // (sums + 1) if sums else product.sizes["K"]


def _times(view: GraphView, name: str, other: str) -> int | None:
    """The one node that reads a value, if it multiplies it with another."""
    place = view.only_reader(name, "Mul")
    return place if place is not None and sorted(view.node(place).inputs) == sorted([name, other]) else None


def _normed(view: GraphView, operation: _Operation, reads: Mapping[str, int]) -> _Operation:
    """The operation with the norm before it, if there is one that nothing else reads, no other product either."""
    place = view.made_by(operation.first.reads, "SkipSimplifiedLayerNormalization", _LIBRARY)
    if place is None or reads[operation.first.reads] != 1:
        return operation
    node, epsilon = view.node(place), view.attributes(place).get("epsilon")
    if len(node.inputs) != 3 or len(node.outputs) != 4 or not node.outputs[3] or not isinstance(epsilon, float):
        return operation
    gamma, (normed, *unused, total) = view.constants.get(node.inputs[2]), node.outputs
    if gamma is None or gamma.dtype != "float32" or gamma.dims != (_width(operation.first),):
        return operation
    if not view.inner(normed, operation.covers) or not all(view.inner(name, []) for name in unused if name):
        return operation
    if any(reader < operation.last.place for reader in view.readers(total)):  # it would be made too late for these
        return operation
    return replace(operation, norm=(*node.inputs, total), epsilon=epsilon, gone=frozenset([place]))
