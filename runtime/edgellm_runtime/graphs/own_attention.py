"""Which attention of a graph edgellm's own operator computes, and the node of it.

Queries, keys and values come to it side by side in one tensor. Where a graph splits this, to norm each head of queries
and of keys, the operator has the norms too. A cache of float16 that is made float32 for an attention, and float16 again
after it, is read and written as it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, Attribute, Node

__all__ = ["ATTENTIONS", "DOMAIN", "OwnAttention", "own_attention"]

DOMAIN = "edgellm"
ATTENTIONS = {"float32": "CachedAttention", "float16": "CachedAttention16", "int8": "CachedAttention8"}  # by the cache
_FLOAT, _HALF = ELEMENT_TYPES["float32"], ELEMENT_TYPES["float16"]
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
        after: the places of those after it.
    """

    node: Node
    covers: frozenset[int]
    after: frozenset[int]


@dataclass(frozen=True)
class _Caches:
    """Keys and values that an attention reads and writes.

    Args:
        dtype: of their elements.
        size: features of a head.
        past: names of what it reads.
        present: names of what it makes of these.
        before: the places of nodes that make float32 of it.
        after: the places of those that make float16 of what the attention gives.
    """

    dtype: str
    size: int
    past: tuple[str, ...]
    present: tuple[str, ...]
    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()


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
    caches = _caches(view, (past_k, past_v), node.outputs[1:])
    if caches is None or (caches.dtype == "int8") != bool(k_scale and v_scale):
        return None
    attributes = view.attributes(place)
    allowed = _NEUTRAL | (_NARROW if k_scale else {})
    if any(attributes[name] not in values for name, values in allowed.items() if name in attributes):
        return None
    if k_scale and not set(_NARROW) <= set(attributes):
        return None
    source = _source(view, place, attributes, caches.size)
    found = None if source is None else _attributes(attributes, source, (bool(cosines), bool(sines)))
    if source is None or found is None:
        return None
    found["head_size"] = caches.size  # which the operator sees by itself, but not who asks whether it is right
    inputs = [source.packed, *caches.past, last, longest, cosines, sines, *source.norms, k_scale, v_scale]
    while not inputs[-1]:
        inputs.pop()
    outputs = (node.outputs[0], *caches.present)
    made = Node(ATTENTIONS[caches.dtype], inputs, outputs, found, domain=DOMAIN, name=node.name)
    return OwnAttention(made, source.covers | caches.before, caches.after)


def _caches(view: GraphView, past: tuple[str, ...], present: tuple[str, ...]) -> _Caches | None:
    """Keys and values that are inputs of the graph, of float32 or codes; or of float16, and cast before and after."""
    before: Sequence[int | None] = ()
    after: Sequence[int | None] = ()
    if any(view.input(name) is None for name in past):
        before = [view.made_by(name, "Cast") for name in past]
        after = [view.only_reader(name, "Cast") for name in present]
        places = [place for place in (*before, *after) if place is not None]
        if (
            len(set(places)) != 4
            or [view.node(place).numbers.get("to") for place in places] != [_FLOAT] * 2 + [_HALF] * 2
        ):
            return None
        past = tuple(view.node(place).inputs[0] for place in places[:2])
        present = tuple(view.node(place).outputs[0] for place in places[2:])
    keys, values = (view.input(name) for name in past)
    if keys is None or keys != values or keys.dtype not in (("float16",) if before else ("float32", "int8")):
        return None
    if keys.dims is None or len(keys.dims) != 4 or not keys.dims[3] or keys.dims[3] % _STEP:
        return None
    return _Caches(keys.dtype, keys.dims[3], past, present, _known(before), _known(after))


def _known(places: Iterable[int | None]) -> frozenset[int]:
    return frozenset(place for place in places if place is not None)


def _attributes(
    given: dict[str, float | str | None], source: _Source, turned: tuple[bool, bool]
) -> dict[str, Attribute] | None:
    scale, window = given.get("scale"), given.get("local_window_size", -1)
    heads, cached, turns = (given.get(name, 0) for name in ("num_heads", "kv_num_heads", "do_rotary"))
    numbers = [heads, cached, turns, window]
    if set(given) - {*_READ, *_NEUTRAL} or not isinstance(scale, float) or scale <= 0:
        return None
    if not all(isinstance(number, int) for number in numbers) or not isinstance(window, int) or not cached:
        return None
    tables = all(turned)
    if bool(turns) != tables or window > _LARGEST_WINDOW or any(turned) != tables:
        return None
    attributes: dict[str, Attribute] = {"num_heads": int(heads or 0), "kv_num_heads": int(cached), "scale": scale}
    attributes |= {"do_rotary": int(tables), "window": max(0, window)}
    return attributes | {"norms": int(any(source.norms)), "epsilon": source.epsilon}


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
