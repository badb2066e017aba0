"""A causal language model of transformers as one that follows edgellm's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import CheckpointError
from edgellm.general.cacheless import replace_attention
from edgellm.general.calls import NAME, OWN, Call, inputs_of, register, under_way
from edgellm.general.experts import replace_experts
from edgellm.general.own_attention import OwnRun, probe_own
from edgellm.general.places import replace_places
from edgellm.general.probe import Layer, Seen, probe
from edgellm.general.recognise import Rotation, Tables, find_rotations, put, replace_norms
from edgellm.general.turns import Turn, find_turn
from edgellm.models.protocol import State, Step
from edgellm.ops import attention, take_positions
from edgellm_runtime.spec import BATCH, CAPACITY, StateSpec

__all__ = ["GeneralConfig", "GeneralModel"]

_DEFAULT_CONTEXT = 2048  # where a configuration does not say
_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")  # by which names it may say
_CLOSE = 1e-4  # of two rotations, relative to the largest query


@dataclass(frozen=True)
class GeneralConfig:
    """What the protocol asks of a configuration.

    Args:
        vocab_size: tokens that the logits cover.
        max_context: the most tokens of a row.
        model_type: what transformers calls the architecture, for people.
    """

    vocab_size: int
    max_context: int
    model_type: str


class GeneralModel(nn.Module):
    """Follows :class:`edgellm.models.protocol.LanguageModel`.

    Args:
        model: a causal language model of transformers in float32, in eval mode; it is taken over. Its weights may be on
            the meta device where :func:`edgellm.streaming.resident` gives them.
        fused: whether to put canonical ops in the place of the norms and rotations that are recognised.

    Raises:
        CheckpointError: its attention, state or head has no form here.
    """

    def __init__(self, model: nn.Module, *, fused: bool = True) -> None:
        super().__init__()
        register()
        foreign: Any = model
        text = foreign.config.get_text_config()
        self.model: Any = foreign
        self._count = int(text.num_hidden_layers)
        if getattr(text, "is_causal", None) is False:
            raise CheckpointError("its attention is not causal; only causal models can be exported")
        if foreign.get_output_embeddings() is None:
            raise CheckpointError(f"{text.model_type} has no vocabulary projection that could be asked for positions")
        context = next((int(n) for key in _CONTEXT if (n := getattr(text, key, None) or 0) > 0), _DEFAULT_CONTEXT)
        replace_places(model, context)
        before, rotations, self.context = self._look(context)
        self.own = not before
        self.notes: list[str] = []
        if self.context < context:
            self.notes.append(f"texts of over {self.context} tokens would be rotated otherwise; the context ends there")
        for name, tables in rotations.items():
            put(model, name, Tables(tables, model.get_submodule(name)))
        self.norms = replace_norms(model) if fused else 0
        self._inside = self._take_rotations(rotations, before) if fused and before else [None] * self._count
        if self.own:
            self.notes.append(
                f"its attention is its modules' own: each step looks at all {self.context} slots of its context"
            )
        self.experts, left = replace_experts(model)
        if left:
            self.notes.append(f"experts of {left[0]} are in a form of their own; each token copies those it has chosen")
        self.config = GeneralConfig(int(text.vocab_size), self.context, str(text.model_type))

    def _look(self, context: int) -> tuple[list[Seen], dict[str, dict[tuple[Any, ...], Rotation]], int]:
        """What the model's layers do, its rotations, and the context that they hold for; of the former no more than
        what layers keep, where attention is not all that they do through transformers.
        """
        before: list[Seen] = []
        try:
            _attend_by(self.model, NAME)
            found = find_rotations(self.model, lambda: before.extend(probe(self.model, self._count)), context)
            self.layers: tuple[Layer, ...] = tuple(seen.layer for seen in before)
        except CheckpointError as error:
            before.clear()
            _attend_by(self.model, OWN)
            try:
                kept: list[Layer] = []
                found = find_rotations(self.model, lambda: kept.extend(probe_own(self.model, self._count)), context)
                self.layers = tuple(kept)
            except CheckpointError as other:
                text = self.model.config.get_text_config()
                heads = getattr(text, "num_attention_heads", 0)
                if not heads or replace_attention(self.model, text.hidden_size, heads) != self._count:
                    raise (error if _attends(self.model) else other) from error
                found = find_rotations(self.model, lambda: before.extend(probe(self.model, self._count)), context)
                self.layers = tuple(seen.layer for seen in before)
        return before, *found

    def _take_rotations(
        self, rotations: Mapping[str, Mapping[tuple[Any, ...], Rotation]], before: Sequence[Seen]
    ) -> list[_Inside | None]:
        """Let attention rotate, where what it would do is what every layer does; what each layer's has inside."""
        every = [rotation for tables in rotations.values() for rotation in tables.values()]
        if not every:
            return [None] * self._count
        modules = {name: self.model.get_submodule(name) for name in rotations}
        for module in modules.values():
            module.idle = True
        plain = probe(self.model, self._count)
        chosen = [_turn_of(a, b, every) for a, b in zip(plain, before, strict=True)]
        if any(found is None for found in chosen):
            for module in modules.values():
                module.idle = False
            self.notes.append("rotary positions are not of the kind that attention has inside; they stay as they are")
            return [None] * self._count
        numbers: dict[tuple[object, ...], int] = {}
        inside: list[_Inside | None] = []
        for found, layer in zip(chosen, self.layers, strict=True):
            if not isinstance(found, Turn):  # a layer that rotates nothing
                inside.append(None)
                continue
            number = numbers.setdefault(found.key, len(numbers))
            for name, table in zip(("cos", "sin"), found.tables(self.context), strict=True):
                self.register_buffer(f"{name}{number}", table.clone(), persistent=False)
            orders = tuple(
                self._order(number, found, heads) if found.reorders else ""
                for heads in (layer.num_heads, layer.num_kv_heads)
            )
            inside.append(_Inside(f"cos{number}", f"sin{number}", *orders))
        return inside

    def _order(self, number: int, turn: Turn, heads: int) -> str:
        """The name of the places (heads * head_dim,) that features of all heads are taken from."""
        name, size = f"order{number}_{heads}", len(turn.order)
        places = torch.arange(heads)[:, None] * size + torch.tensor(turn.order)
        self.register_buffer(name, places.flatten(), persistent=False)
        return name

    def state_specs(self) -> list[StateSpec]:
        """Keys and values of every layer, and what it chooses by."""
        return [
            StateSpec(f"layers.{i}.{part}", (BATCH, heads, CAPACITY, width), "float32", "append")
            for i, layer in enumerate(self.layers)
            for part, heads, width in self._parts(layer)
        ]

    def _parts(self, layer: Layer) -> list[tuple[str, int, int]]:
        """What a layer keeps: names, heads and their widths."""
        heads, wide = layer.num_kv_heads, _head_dim(layer)
        if not self.own:
            return [("k", heads, wide), ("v", heads, wide)]
        chosen = [("index", 1, layer.index_dim)] if layer.index_dim else []
        return [("k", heads, layer.key_dim), ("v", heads, layer.value_dim), *chosen]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (batch, time) to logits (batch, count, vocab_size) and the new state."""
        step = step or Step.whole(tokens)
        time = tokens.shape[1]
        run = OwnRun(state or {}, step, time, self.context) if self.own else _Run(self, state or {}, step)
        positions = step.past_lengths[:, None].long() + torch.arange(tokens.shape[1], device=tokens.device)
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(
            lambda _, args: (take_positions(args[0], step.logit_positions), *args[1:])
        )
        try:
            with under_way(run):
                logits: Tensor = self.model(**inputs_of(self.model, tokens, positions, self._count)).logits
        finally:
            handle.remove()
        return logits, run.present

    @property
    def rotating(self) -> int:
        """Layers whose rotation is inside attention."""
        return sum(names is not None for names in self._inside)

    def inside(self, layer: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries and keys (batch, time, heads * head_dim) as attention rotates them, and its cosines and sines."""
        names = self._inside[layer]
        if names is None:
            return q, k, None, None
        if names.order_q:
            q, k = (x.index_select(2, getattr(self, name)) for x, name in ((q, names.order_q), (k, names.order_k)))
        return q, k, getattr(self, names.cos), getattr(self, names.sin)


class _Inside(NamedTuple):
    """The names of a layer's buffers: tables of its rotation, and places of features; empty where they stay."""

    cos: str
    sin: str
    order_q: str
    order_k: str


class _Run(Call):
    """One step: every layer's attention over its part of the state."""

    def __init__(self, model: GeneralModel, state: State, step: Step) -> None:
        super().__init__()
        self.model, self.state, self.step = model, state, step
        self.present: dict[str, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, keywords: Mapping[str, Any]
    ) -> Tensor:
        known, width = self.model.layers[layer], _head_dim(self.model.layers[layer])
        q, k, v = (_flat(_widened(x, width)) for x in (q, k, v))
        q, k, cos, sin = self.model.inside(layer, q, k)
        key, value = (f"layers.{layer}.{part}" for part in "kv")
        y, present_k, present_v = attention(
            q, k, v, self.state.get(key), self.state.get(value), self.step.past_lengths, self.step.lengths, cos, sin,
            num_heads=known.num_heads, num_kv_heads=known.num_kv_heads, scale=known.scale, softcap=known.softcap,
            window=known.window, sinks=keywords.get("s_aux"),
        )  # fmt: skip
        if present_k is not None and present_v is not None:
            self.present |= {key: present_k, value: present_v}
        heads: Tensor = y.reshape(*y.shape[:2], known.num_heads, width)
        return heads if known.value_dim == width else heads[..., : known.value_dim]


def _head_dim(layer: Layer) -> int:
    """Features that a head's key and value have in the cache: as many as the larger of both."""
    return max(layer.key_dim, layer.value_dim)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _flat(x: Tensor) -> Tensor:
    """(batch, heads, time, head_dim) to (batch, time, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def _turn_of(plain: Seen, rotated: Seen, every: Sequence[Rotation]) -> Turn | bool | None:
    """What turns the unrotated queries and keys of a layer into its own; False for nothing, as they are equal already;
    None where nothing does.
    """
    close = _CLOSE * float(rotated.q.abs().max())
    pairs = ((plain.q, rotated.q), (plain.k, rotated.k))
    if all(torch.allclose(a, b, rtol=0, atol=close) for a, b in pairs):
        return False
    if plain.layer.value_dim != plain.layer.key_dim:
        return None
    return find_turn(pairs, every, close)


def _attends(model: Any) -> bool:
    """Whether a model's attention can be told to be ours; others go on with their own."""
    model.set_attn_implementation(NAME)
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def _attend_by(model: Any, name: str) -> None:
    """Name the attention and the masks of a model, as far as it listens."""
    try:
        model.set_attn_implementation(name)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # the default one branches on how many tokens an expert has
    except (ValueError, NotImplementedError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers does not let its attention be replaced ({why})") from error
    if model.config.get_text_config()._attn_implementation != name:
        if name != OWN:
            raise CheckpointError("its attention is its modules' own, past transformers' attention interface")
        model.config._attn_implementation = name  # its masks are ours, whatever it attends by
