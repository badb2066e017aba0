"""How many bytes a kernel must move, and how many operations it must do, told from its graph and its shapes.

Each tensor counts once: what a kernel reads again because its caches are too small is not in here, so these are the
least that it can do with. What cannot be told is None, and stays so in every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.checks.kernel_events import Kernel
from edgellm_runtime.graphs.external_files import ELEMENT_BITS
from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.layer_map import GraphNode
from edgellm_runtime.graphs.narrow_scales import narrow_scales, scale_bits_of
from edgellm_runtime.graphs.onnx_file import read_message
from edgellm_runtime.graphs.own_attention import ATTENTIONS
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.own_operators import OPERATORS
from edgellm_runtime.graphs.three_bits import whole_codes
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES
from edgellm_runtime.spec import StateSpec

__all__ = ["GraphTraffic", "Step", "Traffic"]

_SAME_BYTES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "Flatten")
# The place of the table among a gather's inputs, and the attribute that says which rows.
_GATHERS = {"Gather": (0, "axis"), "GatherBlockQuantized": (0, "gather_axis"), GATHER: (1, "")}
_PRODUCTS = (
    "MatMul", "FusedMatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "FusedGemm",
)  # fmt: skip
_CELLS = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
_UNKNOWN_OPERATIONS = ("Attention", "LinearAttention", "Einsum", "ConvTranspose", "MultiHeadAttention")
# Read the slots in use and write the new ones, where others read and write all of them. And which of their inputs are
# rotary tables, of which they read a row a token.
_IN_PLACE = {"GroupQueryAttention": (7, 8), **dict.fromkeys(ATTENTIONS.values(), (5, 6))}


@dataclass(frozen=True)
class Step:
    """What one run of a graph did.

    Args:
        past: tokens that the row held before.
        time: tokens that it read.
        capacity: slots of the state.
    """

    past: int
    time: int
    capacity: int


@dataclass(frozen=True)
class Traffic:
    """The least that one kernel, or several, must do.

    Args:
        weights: bytes of weights read.
        state: bytes of state read and written.
        activations: bytes of other inputs and of outputs.
        operations: of arithmetic in products, a multiplication and an addition being two; None where not known. What
            is done once for each element is not counted.
    """

    weights: float = 0
    state: float = 0
    activations: float = 0
    operations: float | None = 0

    @property
    def bytes(self) -> float:
        return self.weights + self.state + self.activations

    def __add__(self, other: Traffic) -> Traffic:
        both = None if self.operations is None or other.operations is None else self.operations + other.operations
        return Traffic(
            self.weights + other.weights, self.state + other.state, self.activations + other.activations, both
        )

    def part(self, count: int) -> Traffic:
        """One of so many equal parts."""
        operations = None if self.operations is None else self.operations / count
        return Traffic(self.weights / count, self.state / count, self.activations / count, operations)


@dataclass(frozen=True)
class _Constant:
    """A weight as kernels find it."""

    nbytes: int
    dims: tuple[int, ...]


class GraphTraffic:
    """The traffic of one graph's kernels.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
        nodes: its nodes.
        specs: of its state.
        run: the nodes that kernels ran; the others were folded into constants, or into a kernel.
    """

    def __init__(
        self, model: Message, nodes: Sequence[GraphNode], specs: Sequence[StateSpec], run: Collection[int]
    ) -> None:
        self._nodes, self._run = nodes, frozenset(run)
        self._past = {spec.past_name: spec for spec in specs}
        self._present = {spec.present_name: spec for spec in specs}
        self._constants = _constants(model, nodes, self._run)
        self._absorbed = self._find_absorbed()

    def of(self, kernel: Kernel, place: int | None, step: Step) -> Traffic | None:
        """What a kernel must do; None where that cannot be told.

        Args:
            kernel: of a run.
            place: the node that it runs, from :func:`~edgellm_runtime.checks.kernel_events.node_of`.
            step: what the run did.
        """
        if place is None or self._nodes[place].op == EXPERTS:  # how many experts were chosen is not told
            return None
        if any(self._nodes[i].body for i in (place, *self._absorbed.get(place, ()))):
            return None
        nodes = [self._nodes[place], *(self._nodes[i] for i in self._absorbed.get(place, ()))]
        inputs = list(dict.fromkeys(name for node in nodes for name in node.inputs if name))
        outputs = {name for node in nodes for name in node.outputs}
        weights = self._weights(nodes[0], inputs, kernel, step)
        if weights is None:
            return None
        past = [self._past[name] for name in inputs if name in self._past]
        present = [self._present[name] for name in outputs if name in self._present]
        whole = sum(spec.nbytes(1, step.capacity) for spec in (*past, *present))
        state = _attended(nodes[0], past, step) if kernel.op in _IN_PLACE else whole
        activations = max(0, kernel.activation_bytes + kernel.output_bytes - whole)
        return Traffic(weights, state, activations, self._operations(kernel, nodes[0], inputs, step))

    def _find_absorbed(self) -> dict[int, tuple[int, ...]]:
        """By the node that a kernel is named after, the neighbours that have no kernel of their own."""
        makers = {name: i for i, node in enumerate(self._nodes) for name in node.outputs if name}
        beside: dict[int, set[int]] = {i: set() for i in range(len(self._nodes))}
        for i, node in enumerate(self._nodes):
            for name in filter(None, node.inputs):
                if name in makers:
                    beside[i].add(makers[name])
                    beside[makers[name]].add(i)
        gone = {
            i for i, node in enumerate(self._nodes)
            if i not in self._run and not all(name in self._constants for name in node.outputs if name)
        }  # fmt: skip
        found = {}
        for i in sorted(self._run):
            waiting, mine = [i], list[int]()
            while waiting:
                for near in sorted(beside[waiting.pop()] & gone):
                    gone.discard(near)
                    mine.append(near)
                    waiting.append(near)
            if mine:
                found[i] = tuple(mine)
        return found

    def _weights(self, node: GraphNode, inputs: Sequence[str], kernel: Kernel, step: Step) -> int | None:
        constants = {name: self._constants[name] for name in inputs if name in self._constants}
        known = {name: constant for name, constant in constants.items() if constant is not None}
        total = sum(constant.nbytes for constant in known.values())
        if len(known) < len(constants):  # of unknown size; kernels that pack nothing tell the sum
            return kernel.parameter_bytes if kernel.parameter_bytes > total else None
        if node.op in _GATHERS and (table := node.inputs[_GATHERS[node.op][0]]) in known:
            return self._picked(node, known[table], total, kernel)
        if node.op in OPERATORS:
            kept = (_kept(node, place, known[name]) for place, name in enumerate(node.inputs) if name in known)
            return sum(kept)
        if node.op == "Slice":
            return min(total, kernel.output_bytes)
        if node.op in _IN_PLACE:
            tables = {node.inputs[i] for i in _IN_PLACE[node.op] if i < len(node.inputs)}
            return sum(_rows(c, step.time) if name in tables else c.nbytes for name, c in known.items())
        return total

    def _picked(self, node: GraphNode, table: _Constant, total: int, kernel: Kernel) -> int:
        """Bytes of the rows that a gather takes."""
        rows, wide = table.dims[0] if table.dims else 0, len(table.dims) - 1
        if node.op == GATHER:  # whose table need not have its rows' shape
            rows, wide = node.numbers.get("N", 0), 1
        if node.numbers.get(_GATHERS[node.op][1], 0) != 0 or not rows or not kernel.made:
            return min(total, kernel.output_bytes)
        made = kernel.made[0]
        return total * min(math.prod(made[: len(made) - wide]), rows) // rows

    def _operations(self, kernel: Kernel, node: GraphNode, inputs: Sequence[str], step: Step) -> int | None:
        if kernel.op in _UNKNOWN_OPERATIONS:
            return None
        count = _COUNTS.get(kernel.op) or _COUNTS.get(node.op)  # a node may be run by a kernel of another name
        if count is None:
            return 0
        weights = {name: c.dims for name in inputs if (c := self._constants.get(name)) is not None}
        return count(_Shapes(kernel, node, weights, step)) if kernel.made else None


@dataclass(frozen=True)
class _Shapes:
    """What the operations of a kernel are counted from."""

    kernel: Kernel
    node: GraphNode
    weights: Mapping[str, tuple[int, ...]]  # sizes, by name
    step: Step

    @property
    def made(self) -> int:
        """Elements of the first output."""
        return math.prod(self.kernel.made[0])


def _product(shapes: _Shapes) -> int | None:
    """Two for each element of the result and of what is summed over."""
    made, right = shapes.kernel.made[0], shapes.weights.get(shapes.node.inputs[1], ())
    if len(right) == 2 and made and made[-1]:
        return 2 * shapes.made * (math.prod(right) // made[-1])
    left = shapes.kernel.given[0] if shapes.kernel.given else ()
    if len(left) < 2 or len(made) < 2:
        return 2 * shapes.made * left[0] if left else None
    return 2 * shapes.made * (left[-1] if left[-2] == made[-2] else left[-2])  # which may be turned


def _blocks(shapes: _Shapes) -> int | None:
    size = shapes.node.numbers.get("K")
    return None if size is None else 2 * shapes.made * size


def _gated(shapes: _Shapes) -> int | None:
    """Both products of an MLP with a gate."""
    sizes = [shapes.node.numbers.get(name) for name in ("N", "K", "N_down", "K_down")]
    if None in sizes:
        return None
    first, read, last, between = (int(size or 0) for size in sizes)
    return 2 * shapes.made // max(1, last) * (first * read + last * between)


def _cells(shapes: _Shapes) -> int | None:
    """Two for each weight of the gates, token and row."""
    matrices = [dims for dims in shapes.weights.values() if len(dims) == 3]
    if not matrices or not shapes.kernel.given or len(shapes.kernel.given[0]) != 3:
        return None
    return 2 * math.prod(shapes.kernel.given[0][:2]) * sum(map(math.prod, matrices))


def _convolution(shapes: _Shapes) -> int | None:
    filters = [dims for dims in shapes.weights.values() if len(dims) > 2]
    return 2 * shapes.made * math.prod(filters[0][1:]) if filters else None


def _attention(shapes: _Shapes) -> int | None:
    """Two for each element of a query and token that it sees, and as many for the sum of values."""
    return 4 * shapes.made // max(1, shapes.step.time) * _seen(shapes.node, shapes.step)


_COUNTS: Mapping[str, Callable[[_Shapes], int | None]] = {
    **dict.fromkeys(_PRODUCTS, _product), **dict.fromkeys(_CELLS, _cells),
    "MatMulNBits": _blocks, "BlockProduct": _blocks, "NormProduct": _blocks, "GatedMlp": _gated,
    "NormGatedMlp": _gated, "Conv": _convolution, "FusedConv": _convolution,
    **dict.fromkeys(_IN_PLACE, _attention),
}  # fmt: skip


def _window(node: GraphNode, step: Step) -> int:
    """How many tokens one of them sees at the most."""
    window = node.numbers.get("local_window_size", node.numbers.get("window", -1))
    return window if window > 0 else step.past + step.time


def _seen(node: GraphNode, step: Step) -> int:
    """Pairs of a token and one that it sees, itself among them."""
    window = _window(node, step)
    return sum(min(step.past + i + 1, window) for i in range(step.time))


def _attended(node: GraphNode, past: Sequence[StateSpec], step: Step) -> int:
    """Bytes of the slots that attention reads and of those that it writes."""
    slots = min(step.past, max(0, _window(node, step) - 1)) + step.time
    return sum(spec.nbytes(1, slots if spec.capacity_axis is not None else step.capacity) for spec in past)


def _kept(node: GraphNode, place: int, stored: _Constant) -> int:
    """Bytes that an own operator's product reads of an input: codes of 3 bits are kept as 4, scales of 8 as 16."""
    which, kind = divmod(place - (3 if "Norm" in node.op else 1), 3)  # codes, scales and zeros of each product
    suffix = "_down" if which > 0 else ""
    if kind == 0 and node.numbers.get(f"bits{suffix}") == 3:
        return stored.nbytes * 4 // 3
    if kind == 1 and scale_bits_of(node.numbers, suffix) == 8 and len(stored.dims) == 2:
        return 2 * stored.dims[0] * (stored.dims[1] - 1)
    return stored.nbytes


def _rows(table: _Constant, count: int) -> int:
    """Bytes of so many of a table's rows."""
    rows = table.dims[0] if table.dims else 0
    return table.nbytes * min(count, rows) // rows if rows else table.nbytes


def _constants(model: Message, nodes: Sequence[GraphNode], run: Collection[int]) -> dict[str, _Constant | None]:
    """Weights, and what ONNX Runtime has made of weights when it loaded the graph; None where its size is not known."""
    graph: dict[str, Any] = model.get("graph", {})
    types: dict[str, int] = {}
    found: dict[str, _Constant | None] = {}
    told = _told(graph) | _made_of_codes(model)
    for tensor in graph.get("initializer", ()):
        name, kind = _text(tensor.get("name", b"")), int(tensor.get("data_type", 0))
        dims = tuple(int(size) for size in tensor.get("dims", ()))
        types[name], found[name] = kind, _sized(dims, kind)
    for i, node in enumerate(nodes):
        given = [name for name in node.inputs if name]
        if i in run or node.body or any(name not in found for name in given):
            continue
        first = found[given[0]] if given else None
        kind = node.numbers.get("to", 0) if node.op == "Cast" else types.get(given[-1], 0) if given else 0
        for name in filter(None, node.outputs):
            if node.op == "Cast" or (node.op == "DequantizeLinear" and len(given) > 1):
                kind = kind if node.op == "Cast" else types.get(given[1], 0)
                found[name] = None if first is None else _sized(first.dims, kind)
            elif node.op in _SAME_BYTES and first is not None:
                found[name], kind = _Constant(first.nbytes, ()), types.get(given[0], 0)
            else:
                found[name] = told.get(name)
            types[name] = kind
    return found


def _made_of_codes(model: Message) -> dict[str, _Constant]:
    """What is made of scales of 8 bits and of codes of 3."""
    view = GraphView(model)
    scales = ((name, made.dims or (), ELEMENT_TYPES[made.dtype]) for name, made in narrow_scales(view))
    codes = ((view.node(place).outputs[0], three.dims, ELEMENT_TYPES["uint8"]) for place, three in whole_codes(view))
    return {name: sized for name, dims, kind in (*scales, *codes) if (sized := _sized(dims, kind)) is not None}


def _told(graph: Message) -> dict[str, _Constant]:
    """What the graph itself says of the sizes of values between its nodes, such as tables that are computed."""
    found: dict[str, _Constant] = {}
    for value in (read_message(data, "value") for data in graph.get("value_info", ())):
        tensor = value.get("type", {}).get("tensor_type", {})
        dims = [dim.get("dim_value") for dim in tensor.get("shape", {}).get("dim", ())]
        if "shape" in tensor and all(isinstance(size, int) for size in dims):
            sized = _sized(tuple(map(int, dims)), int(tensor.get("elem_type", 0)))
            found |= {} if sized is None else {_text(value.get("name", b"")): sized}
    return found


def _sized(dims: tuple[int, ...], kind: int) -> _Constant | None:
    bits = ELEMENT_BITS.get(kind)
    return None if bits is None else _Constant((math.prod(dims) * bits + 7) // 8, dims)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
