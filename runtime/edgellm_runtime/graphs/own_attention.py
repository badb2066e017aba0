"""Which attention of a graph edgellm's own operator computes, and the node of it."""

from __future__ import annotations

from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.writer import Attribute, Node

__all__ = ["ATTENTIONS", "DOMAIN", "own_attention"]

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


def own_attention(view: GraphView, place: int) -> Node | None:
    """The node of edgellm's own attention that computes what a node of a graph does; None if there is none.

    Args:
        view: the graph.
        place: of the node.
    """
    node = view.node(place)
    if (node.op, view.domain(place)) != ("GroupQueryAttention", "com.microsoft"):
        return None
    names = [*node.inputs, *[""] * (14 - len(node.inputs))]
    queries, keys, values, past_k, past_v, last, longest, cosines, sines, *others, k_scale, v_scale = names
    caches = [view.input(past_k), view.input(past_v)]
    if keys or values or any(others) or len(names) > 14 or len(node.outputs) != 3:
        return None
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
    return _node(view, place, attributes, [queries, past_k, past_v, last, longest, cosines, sines, k_scale, v_scale])


def _node(view: GraphView, place: int, given: dict[str, float | str | None], inputs: list[str]) -> Node | None:
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
    while not inputs[-1]:
        inputs.pop()
    return Node(ATTENTIONS[len(inputs) > 7], inputs, node.outputs, attributes, domain=DOMAIN, name=node.name)
