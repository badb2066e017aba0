"""Which attention of a graph edgellm's own operator computes, and the node of it.

Queries, keys and values come to it side by side in one tensor. Where a graph splits this, to norm each head of queries
and of keys, the operator has the norms too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.writer import Attribute, Node

__all__ = ["ATTENTIONS", "DOMAIN", "OwnAttention", "own_attention"]

DOMAIN = "edgellm"
ATTENTIONS = ("CachedAttention", "CachedAttention8")  # over a cache of floats; of 8 bits
_STEP = 16  # features of a head are a multiple of it
_LARGEST_WINDOW = 1 << 30
_NEUTRAL: dict[str, tuple[float | str, ...]] = {  # what other attributes may say without a change of the result
    "rotary_interleaved": (0,), "smooth_softmax": (0, -1), "softcap": (0.0,), "k_quant_type": ("NONE",),
    "v_quant_type": ("NONE",), "kv_cache_bit_width": (0,),
}  # fmt: skip
_NARROW: dict[str, tuple[float | str, ...]] = {
    "k_quant_type": ("PER_CHANNEL",), "v_quant_type": ("PER_CHANNEL",), "kv_cache_bit_width": (8,),
}  # fmt: skip
_READ = ("num_heads", "kv_num_heads", "scale", "do_rotary", "local_window_size")


@dataclass(frozen=True)
class OwnAttention:
    """A node of edgellm's own attention.

    Args:
        node: it.
        covers: the places of nodes before it that it stands for.
    """

    node: Node
    covers: frozenset[int]


@dataclass(frozen=True)
class _Normed:
    """Heads and their norm.

    Args:
        x: the tensor before it.
        weight: of the norm.
        epsilon: of the norm.
        covers: the places of its nodes.
    """

    x: str
    weight: str
    epsilon: float
    covers: frozenset[int]


@dataclass(frozen=True)
class _Source:
    """Where queries, keys and values come from.

    Args:
        packed: the tensor with all of them.
        norms: weights of the norms of queries' and of keys' heads; empty where there are none.
        epsilon: of the norms.
        covers: the places of nodes between it and the attention.
    """

    packed: str
    norms: tuple[str, str] = ("", "")
    epsilon: float = 0.0
    covers: frozenset[int] = frozenset()


def own_attention(view: GraphView, place: int) -> OwnAttention | None:
    """The node of edgellm's own attention that computes what a node of a graph does; None if there is none.

    Args:
        view: the graph.
        place: of the node.
    """
    node = view.node(place)
    if (node.op, view.domain(place)) != ("GroupQueryAttention", "com.microsoft"):
        return None
    names = [*node.inputs, *[""] * (14 - len(node.inputs))]
    *_, past_k, past_v, last, longest, cosines, sines, _, _, _, k_scale, v_scale = names
    if any(names[9:12]) or len(names) > 14 or len(node.outputs) != 3:
        return None
    caches = [view.input(past_k), view.input(past_v)]
    dtypes = {cache and cache.dtype for cache in caches}
    if dtypes not in ({"float32"}, {"int8"}) or (dtypes == {"int8"}) != bool(k_scale and v_scale):
        return None
    dims = [cache.dims for cache in caches if cache is not None]
    if dims[0] != dims[1] or dims[0] is None or len(dims[0]) != 4 or not dims[0][3] or dims[0][3] % _STEP:
        return None
    attributes = view.attributes(place)
    allowed = _NEUTRAL | (_NARROW if k_scale else {})
    if any(attributes[name] not in values for name, values in allowed.items() if name in attributes):
        return None
    if k_scale and not set(_NARROW) <= set(attributes):
        return None
    source = _source(view, place, attributes, dims[0][3])
    if source is None:
        return None
    inputs = [source.packed, past_k, past_v, last, longest, cosines, sines, *source.norms, k_scale, v_scale]
    made = _node(view, place, attributes, inputs, source.epsilon)
    return None if made is None else OwnAttention(made, source.covers)


def _node(
    view: GraphView, place: int, given: dict[str, float | str | None], inputs: list[str], epsilon: float
) -> Node | None:
    node = view.node(place)
    scale, window = given.get("scale"), given.get("local_window_size", -1)
    heads, cached, turns = (given.get(name, 0) for name in ("num_heads", "kv_num_heads", "do_rotary"))
    numbers = [heads, cached, turns, window]
    if set(given) - {*_READ, *_NEUTRAL} or not isinstance(scale, float) or scale <= 0:
        return None
    if not all(isinstance(number, int) for number in numbers) or not isinstance(window, int) or not cached:
        return None
    tables = all(inputs[5:7])
    if bool(turns) != tables or window > _LARGEST_WINDOW or any(inputs[5:7]) != tables:
        return None
    attributes: dict[str, Attribute] = {"num_heads": int(heads or 0), "kv_num_heads": int(cached), "scale": scale}
    attributes |= {"do_rotary": int(tables), "window": max(0, window)}
    attributes |= {"norms": int(any(inputs[7:9])), "epsilon": epsilon}
    op = ATTENTIONS[bool(inputs[-1])]
    while not inputs[-1]:
        inputs.pop()
    return Node(op, inputs, node.outputs, attributes, domain=DOMAIN, name=node.name)


def _source(view: GraphView, place: int, given: dict[str, float | str | None], size: int) -> _Source | None:
    """What an attention reads: one tensor, or parts of one whose heads are normed; None if it is something else."""
    queries, keys, values = view.node(place).inputs[:3]
    if not keys and not values:
        return _Source(queries)
    counts = (given.get("num_heads"), given.get("kv_num_heads"))
    if not all(isinstance(count, int) for count in counts):
        return None
    heads, cached = (int(count or 0) for count in counts)
    q, k = _normed(view, queries, heads, size), _normed(view, keys, cached, size)
    if q is None or k is None or q.epsilon != k.epsilon:
        return None
    split = view.made_by(q.x, "Split")
    if split is None or view.node(split).outputs != (q.x, k.x, values):
        return None
    node = view.node(split)
    sizes = view.numbers(node.inputs[1]) if len(node.inputs) == 2 else None
    if sizes != (heads * size, cached * size, cached * size) or node.numbers.get("axis") != -1:
        return None
    return _Source(node.inputs[0], (q.weight, k.weight), q.epsilon, q.covers | k.covers | {split})


def _normed(view: GraphView, name: str, heads: int, size: int) -> _Normed | None:
    """What a tensor is made of, if by a norm of each of its heads."""
    merge = view.made_by(name, "Reshape")
    norm = None if merge is None else view.made_by(view.node(merge).inputs[0], "SimplifiedLayerNormalization")
    part = None if norm is None else view.made_by(view.node(norm).inputs[0], "Reshape")
    if merge is None or norm is None or part is None:
        return None
    for at, shape in ((part, (0, 0, heads, size)), (merge, (0, 0, heads * size))):
        if view.numbers(view.node(at).inputs[1]) != shape or view.node(at).numbers.get("allowzero", 0):
            return None
    weight, attributes = view.node(norm).inputs[1], view.attributes(norm)
    found, epsilon = view.constants.get(weight), attributes.get("epsilon")
    if found is None or found.dtype != "float32" or found.dims is None or prod(found.dims) != size:
        return None
    if set(attributes) - {"axis", "epsilon", "stash_type"} or attributes.get("axis", -1) != -1:
        return None
    if not isinstance(epsilon, float):
        return None
    return _Normed(view.node(part).inputs[0], weight, epsilon, frozenset([part, norm, merge]))
