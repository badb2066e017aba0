"""The most memory that a process will hold with a bundle on the CPU, predicted from its graphs before they are loaded.

The figures beside what files say were measured with ONNX Runtime on Linux; docs/embedding.md has how far they were off.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from edgellm_runtime.bundle import Bundle
from edgellm_runtime.graphs.external_files import ELEMENT_BITS
from edgellm_runtime.graphs.graph_view import GraphView, nodes_as_they_should_be
from edgellm_runtime.graphs.layer_map import GraphNode, graph_nodes
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.own_attention import ATTENTIONS
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.own_operators import OPERATORS, with_own_operators
from edgellm_runtime.graphs.three_bits import PARTS, whole_codes
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.state.memory_need import memory_need

__all__ = ["MemoryPeak", "memory_peak"]

LIBRARIES = 66 << 20  # Python, NumPy, this package, and ONNX Runtime with a session of next to nothing
_TEXT = 4  # bytes that a tokenizer takes for each of its file's
_CHUNK = 512  # tokens of a prompt that are read at once
_WIDE = 2.5  # times its widest product, that a layer holds of each token of a chunk
_PRODUCTS = ("MatMul", "Gemm", "Conv", "LSTM", "GRU", "RNN", *OPERATORS)
_PIECE = 1 << 20  # of what own kernels put in order, after which it is given back
_SPREAD = (PARTS + 1) / PARTS  # of codes of 3 bits, as kernels read them
_ARENA = 1.4  # the arena takes memory in pieces that are larger than what is asked for


@dataclass(frozen=True)
class MemoryPeak:
    """Predicted bytes of a process that has one model, by what they are for.

    Args:
        libraries: before there is a model.
        text: the tokenizer.
        weights: as kernels keep them. ONNX Runtime's have a table that is both looked up and multiplied with twice, and
            a scale of 16 bits made one of 32 beside it; own ones leave that table in its file, and scales as they are.
        loading: beside the weights while they are loaded, and not after it: the largest as it was and as it becomes;
            own kernels give back what they have read.
        state: of the tokens asked about.
        scratch: of a step over the longest piece of a prompt of so many tokens.
    """

    libraries: int
    text: int
    weights: int
    loading: int
    state: int
    scratch: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.libraries + self.text + self.weights + max(self.loading, self.state + self.scratch)

    def __str__(self) -> str:
        text, weights, loading, state, scratch = (
            f"{part / 2**20:,.0f}" for part in (self.text, self.weights, self.loading, self.state, self.scratch)
        )
        return (
            f"about {self.total / 2**20:,.0f} MiB: libraries {self.libraries / 2**20:,.0f}, tokenizer {text}, weights "
            f"{weights} (and {loading} while they are loaded), state {state}, a piece of a prompt {scratch}"
        )


def memory_peak(bundle: Bundle, context: int | None = None, *, kernels: str = "onnxruntime") -> MemoryPeak:
    """What a bundle's process will hold at most, on the CPU.

    Args:
        bundle: which; its graphs are read, and nothing of them is run.
        context: tokens of a prompt; None: as many as the model's context holds.
        kernels: ``onnxruntime`` or ``own``, those that are to run.

    Raises:
        OptionError: a context that is longer than the model's.
        BundleError: a graph cannot be read.
    """
    manifest = bundle.manifest
    need = memory_need(manifest, "cpu", context)
    names = [name for name in manifest.files if name.endswith(".onnx") and name not in manifest.engine_files]
    files = {name: bundle.file(name).read_bytes() for name in names}
    if kernels == "own":
        encoder = manifest.encoder.file if manifest.encoder is not None else ""
        files |= {name: with_own_operators(data)[0] for name, data in files.items() if name != encoder}
    graphs = [read_model(data) for data in files.values()]
    with nodes_as_they_should_be():
        sizes, loading = [size for graph in graphs for size in _weights(graph).values()], max(map(_loading, graphs))
    chunk = min(_CHUNK, need.context)
    vocabulary = int(manifest.signature.logits.shape[-1])
    widest, heads = max(_widest(graph, vocabulary) for graph in graphs), max(map(_heads, graphs))
    seen = 4 * heads * chunk * need.context  # how much each token of a piece attends to each before it
    scratch = _ARENA * (4 * _WIDE * widest * chunk + seen) + 4 * vocabulary
    tokenizer = manifest.files.get("tokenizer.json")
    return MemoryPeak(
        LIBRARIES, _TEXT * tokenizer.bytes if tokenizer is not None else 0, sum(sizes), loading, need.state,
        int(scratch),
    )  # fmt: skip


def _weights(model: Message) -> dict[str, int]:
    """Bytes that each initializer of a graph takes once it is loaded."""
    nodes, known = graph_nodes(model), _initializers(model)
    codes = {name for name, tensor in known.items() if _sizes(tensor)[:-1] == [PARTS]}
    times: dict[str, float] = {
        node.inputs[0]: 3 for node in nodes if node.op == "Cast" and node.inputs
    }  # float16, and float32 beside it
    times |= {node.inputs[0]: 5 for node in nodes if node.op == "Split" and node.inputs}  # so too bytes of scales
    times |= {name: count * _SPREAD for name, count in _spread(model).items()}
    times |= {name: _SPREAD for node in nodes if _reads_three_bits(node) for name in node.inputs if name in codes}
    in_files = {
        node.inputs[1] for node in nodes if node.op == GATHER and "external_data" in known.get(node.inputs[1], ())
    }
    in_files -= {name for node in nodes for place, name in enumerate(node.inputs) if (node.op, place) != (GATHER, 1)}
    return {name: int(_bytes(tensor) * times.get(name, 1)) for name, tensor in known.items() if name not in in_files}


def _spread(model: Message) -> Counter[str]:
    """Codes of 3 bits that are put in order for ONNX Runtime's kernels, and how many tensors are made of each."""
    return Counter(three.name for _, three in whole_codes(GraphView(model)))


def _reads_three_bits(node: GraphNode) -> bool:
    """Whether a node is of an own operator that keeps such codes as bytes of two."""
    return node.op in (*OPERATORS, EXPERTS) and 3 in (node.numbers.get("bits"), node.numbers.get("bits_down"))


def _loading(model: Message) -> int:
    """Bytes of what is there beside the weights, as it was read, while one of them is loaded.

    Codes of 3 bits are all there as they were put in order, and again as the library has copied them.
    """
    own = {name for node in graph_nodes(model) if node.op in OPERATORS for name in node.inputs}
    weights, spread = _weights(model), _spread(model)
    largest = max((min(size, _PIECE) if name in own else size for name, size in weights.items()), default=0)
    return max(largest, sum(weights[name] + weights[name] // count for name, count in spread.items()))


def _initializers(model: Message) -> dict[str, Message]:
    tensors = model.get("graph", {}).get("initializer", ())
    return {tensor.get("name", b"").decode(errors="replace"): tensor for tensor in tensors}


def _sizes(tensor: Message) -> list[int]:
    return [max(int(size), 0) for size in tensor.get("dims", ())]


def _bytes(tensor: Message) -> int:
    return (math.prod(_sizes(tensor)) * ELEMENT_BITS.get(int(tensor.get("data_type", 0)), 32) + 7) // 8


def _widest(model: Message, vocabulary: int) -> int:
    """Features of the widest product but the one onto the vocabulary, which is of few tokens."""
    known, widths = _initializers(model), {0}
    for node in graph_nodes(model):
        if not any(kind in node.op for kind in _PRODUCTS):
            continue
        if said := {node.numbers[name] for name in ("N", "N_down") if name in node.numbers}:
            widths |= said
            continue
        for sizes in (_sizes(known[name]) for name in node.inputs[1:] if name in known):
            widths |= {sizes[0], sizes[-1]} if len(sizes) > 1 else set()
    return max(widths - {vocabulary})


def _heads(model: Message) -> int:
    """The most heads of a kernel of attention that holds all scores at once; 0: there is none, or it is an own one."""
    kernels = [node for node in graph_nodes(model) if "Attention" in node.op and node.op not in ATTENTIONS]
    return max((node.numbers.get("num_heads", 0) for node in kernels), default=0)
