"""How transformers' attention is taken over: functions registered with its interfaces, which serve the call under way.

A layer hands its keys and values to its cache and then calls its attention. Whoever runs a model puts a :class:`Call`
on the stack first; the cache of :func:`inputs_of` and our attention tell it. The cache knows its call, so that a layer
can be run again by itself, with the arguments that it was called with, as calibration and tuning do.
"""

from __future__ import annotations

import abc
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edgellm.errors import CheckpointError

__all__ = [
    "NAME",
    "OWN",
    "Call",
    "Mask",
    "attended",
    "inputs_of",
    "positions_under_way",
    "register",
    "strange",
    "under_way",
]

NAME = "edgellm"  # of our attention, in transformers' interfaces
OWN = "edgellm-own"  # of plain attention under our masks, for models that do more than attend
# What layers say to their attention that changes nothing of what is computed here.
NEUTRAL = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "layer_head_mask", "logits_to_keep",
    "max_length_k", "max_length_q", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_value", "past_key_values", "position_embeddings", "position_ids", "return_dict",
    "use_cache",
})  # fmt: skip
_NOT_ALONE = "its layers tell no cache what they attend to, so that none can be run by itself; leave --tune out"
_STACK: list[Call] = []
_TOLD: list[weakref.ref[Call]] = []  # at most one: the call whose cache was told last


class Mask:
    """In the place of a mask: what it would let a token see.

    Args:
        sees: transformers' mask function of (batch, head, query position, key position).
    """

    def __init__(self, sees: Any) -> None:
        self.sees = sees

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CheckpointError(
            f"it computes with its attention mask itself (mask.{name}), past transformers' attention; "
            "that has no form here"
        )

    def __getitem__(self, at: Any) -> Any:
        return self.__getattr__("[...]")


class Call(abc.ABC):
    """One run of a model through our attention."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None  # (batch, time), of the tokens under way
        self.waiting: list[int] = []  # layers whose cache was updated and that have not attended yet

    @abc.abstractmethod
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, keywords: Mapping[str, Any]
    ) -> Tensor:
        """Q (batch, heads, time, head_dim) over k and v (batch, kv_heads, time, head_dim); (batch, time, heads, dim).

        Args:
            layer: whose cache was given k and v.
            q: queries.
            k: keys.
            v: values.
            mask: a :class:`Mask`, or what the model passes instead.
            scale: factor on the scores; None: 1 / sqrt(head_dim).
            keywords: all that the layer says besides.
        """

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's cache gives for new keys and values (batch, kv_heads, time, head_dim)."""
        self.waiting.append(layer)
        return k, v

    def update_index(self, layer: int, k: Tensor) -> Tensor:
        """What a layer's cache gives for new keys (batch, time, dim), by which it chooses what it attends to."""
        raise CheckpointError("its layers choose the tokens that they attend to")

    def kept(self) -> int:
        """Tokens that a cache says it holds, before the new ones."""
        return 0

    def slots(self, time: int) -> int:
        """Keys that a layer is given for so many new tokens."""
        return time

    def mask(self, sees: Any, dtype: torch.dtype) -> Any:
        """What a model is given as its mask, from transformers' mask function."""
        return Mask(sees)


@contextmanager
def under_way(call: Call) -> Iterator[None]:
    """Let a call serve what a model asks of our attention."""
    _STACK.append(call)
    try:
        yield
    finally:
        _STACK.pop()


def _served() -> Call:
    """The call under way; of a layer that is run by itself, the one whose cache it has just told."""
    found = _STACK[-1] if _STACK else _TOLD[0]() if _TOLD else None
    if found is None:
        raise CheckpointError(_NOT_ALONE)
    return found


def register() -> None:
    """Make our attention and its masks known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(OWN, _plain)
    for name in (NAME, OWN):
        AttentionMaskInterface.register(name, _mask)


def _mask(*args: Any, mask_function: Any = None, dtype: torch.dtype = torch.float32, **keywords: Any) -> Any:
    return _STACK[-1].mask(mask_function, dtype)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    call = _served()
    if not call.waiting:
        raise CheckpointError(
            f"{type(module).__name__} attends to keys and values that no layer's cache was given; such layers have no "
            "form here"
        )
    return call.attend(call.waiting.pop(), query, key, value, attention_mask, scaling, keywords), None


def _plain(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """softmax(q k + mask) v, over the keys that the layer chose, with its sinks; a window is in the mask."""
    if odd := strange(keywords, "sliding_window", "indices", "s_aux"):
        raise CheckpointError(f"its attention is given {', '.join(odd)}, which is not understood here")
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = scores + attention_mask
    if (chosen := keywords.get("indices")) is not None:  # (batch, time, keys that each token attends to)
        least = torch.finfo(scores.dtype).min
        others = torch.full_like(scores[:, 0], least).scatter(-1, chosen.long(), 0.0)
        scores = (scores + others[:, None]).clamp(min=least)
    if (sinks := keywords.get("s_aux")) is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def attended(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a layer without a cache attends to: (batch, heads, time, head_dim) to (batch, time, heads, head_dim)."""
    if not _STACK:
        raise CheckpointError(_NOT_ALONE)
    call = _STACK[-1]
    k, v = call.update(layer, k, v)
    return call.attend(call.waiting.pop(), q, k, v, None, None, {})


def strange(keywords: Mapping[str, Any], *known: str) -> list[str]:
    """What a layer says to its attention that is neither known nor without effect."""
    return sorted(n for n, value in keywords.items() if value is not None and n not in NEUTRAL and n not in known)


def positions_under_way() -> Tensor:
    """(batch, time): of the tokens that the call under way reads."""
    found = _served().positions
    assert found is not None
    return found


def inputs_of(model: Any, tokens: Tensor, positions: Tensor, layers: int) -> dict[str, Any]:
    """What a model of transformers is called with for one step.

    Args:
        model: it.
        tokens: (batch, time) int64.
        positions: (batch, time) int64.
        layers: how many it has.
    """
    _STACK[-1].positions = positions
    named = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in named else "past_key_values"  # its name before transformers 5.24
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    where = {"position_ids": positions} if every or "position_ids" in named else {}
    return {"input_ids": tokens, **where, cache: _slots_of(layers), "use_cache": True}


def _slots_of(layers: int) -> Any:
    """A cache whose layers hand keys and values straight on; our attention does the rest."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    call = _STACK[-1]

    class Slot(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.is_initialized = index, True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            pass

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            _TOLD[:] = [weakref.ref(call)]
            return call.update(self.index, key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return call.slots(query_length), 0

        def get_seq_length(self) -> int:
            return call.kept()

        def get_max_length(self) -> int:
            return -1

    class Slots(Cache):  # type: ignore[misc]
        def update_indexer(self, key_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
            return call.update_index(layer_idx, key_states)

        get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse_state

        def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
            return False

    return Slots(layers=[Slot(index) for index in range(layers)])


def _refuse_state(self: Any, *args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        "it is recurrent: its layers keep another state than keys and values, such as a recurrence's or a "
        "convolution's, and the general road has attention alone; such a family needs a file of its own in "
        "edgellm/models"
    )
