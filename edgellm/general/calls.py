"""How transformers' attention is taken over: functions registered with its interfaces, which serve the call under way.

A layer hands its keys and values to its cache and then calls its attention. Whoever runs a model puts a :class:`Call`
on the stack first; the cache of :func:`inputs_of` and our attention tell it.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from edgellm.errors import CheckpointError

__all__ = ["NAME", "Call", "Mask", "inputs_of", "register", "under_way"]

NAME = "edgellm"  # of our attention, in transformers' interfaces
_STACK: list[Call] = []


class Mask:
    """In the place of a mask: what it would let a token see.

    Args:
        sees: transformers' mask function of (batch, head, query position, key position).
    """

    def __init__(self, sees: Any) -> None:
        self.sees = sees


class Call(abc.ABC):
    """One run of a model through our attention."""

    def __init__(self) -> None:
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


@contextmanager
def under_way(call: Call) -> Iterator[None]:
    """Let a call serve what a model asks of our attention."""
    _STACK.append(call)
    try:
        yield
    finally:
        _STACK.pop()


def register() -> None:
    """Make our attention and its masks known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, mask_function=None, **keywords: Mask(mask_function))


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    call = _STACK[-1]
    if not call.waiting:
        raise CheckpointError(
            f"{type(module).__name__} attends to keys and values that no layer's cache was given; such layers have no "
            "form here"
        )
    return call.attend(call.waiting.pop(), query, key, value, attention_mask, scaling, keywords), None


def inputs_of(model: Any, tokens: Tensor, positions: Tensor, layers: int) -> dict[str, Any]:
    """What a model of transformers is called with for one step.

    Args:
        model: it.
        tokens: (batch, time) int64.
        positions: (batch, time) int64.
        layers: how many it has.
    """
    named = inspect.signature(model.forward).parameters
    cache = "cache" if "cache" in named else "past_key_values"  # its name before transformers 5.24
    return {"input_ids": tokens, "position_ids": positions, cache: _slots_of(layers), "use_cache": True}


def _slots_of(layers: int) -> Any:
    """A cache whose layers hand keys and values straight on; our attention does the rest."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Slot(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.is_initialized = index, True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            pass

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            _STACK[-1].waiting.append(self.index)
            return key_states, value_states

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

    class Slots(Cache):  # type: ignore[misc]
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
