"""What edgellm asks of a model. Any ``nn.Module`` of this shape can be trained, exported and run.

Nothing here knows an architecture or an export format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from edgellm.ops.positions import positions_noted
from edgellm_runtime.spec import StateSpec

__all__ = [
    "LabellingConfig",
    "LanguageModel",
    "ModelConfig",
    "OnePassConfig",
    "SourceConfig",
    "SourceModel",
    "State",
    "Step",
    "answers_sources",
    "empty_state",
    "logit_width",
    "read_rows",
    "reads_in_one_pass",
    "with_hidden",
]

State = Mapping[str, Tensor]


class Step(NamedTuple):
    """What a step takes besides the tokens and the state."""

    past_lengths: Tensor  # (batch,) int32: tokens that each row already holds
    lengths: Tensor  # (batch,) int32: how many of the new tokens are valid, at least 1; the rest is padding
    logit_positions: Tensor  # (batch, count) int64: which of the new positions to project to logits

    @classmethod
    def whole(cls, tokens: Tensor) -> Step:
        """Nothing came before, every token is valid, logits are wanted at every position.

        Args:
            tokens: (batch, time) int64.
        """
        batch, time = tokens.shape
        lengths = torch.full((batch,), time, dtype=torch.int32, device=tokens.device)
        every = torch.arange(time, device=tokens.device).expand(batch, time)
        return cls(torch.zeros_like(lengths), lengths, every)


@runtime_checkable
class ModelConfig(Protocol):
    """What every configuration, a frozen dataclass, says about its model."""

    @property
    def vocab_size(self) -> int:
        """How many tokens the logits cover."""
        ...

    @property
    def max_context(self) -> int:
        """The most tokens that one row may hold."""
        ...


@runtime_checkable
class LabellingConfig(ModelConfig, Protocol):
    """The configuration of a model that may label tokens instead of predicting the next one."""

    @property
    def num_labels(self) -> int:
        """How many labels the logits are over; 0: they are over the vocabulary."""
        ...


@runtime_checkable
class OnePassConfig(ModelConfig, Protocol):
    """The configuration of a model whose tokens may see those after them, so that a row is read in one step."""

    @property
    def one_pass(self) -> bool:
        """Whether they do: each step is then given whole rows, and nothing is carried to another."""
        ...


@runtime_checkable
class SourceConfig(ModelConfig, Protocol):
    """The configuration of a model that answers sources."""

    @property
    def max_source(self) -> int:
        """The most tokens of a source."""
        ...

    @property
    def start_tokens(self) -> Sequence[int]:
        """What every answer begins with, at least one token."""
        ...


def logit_width(config: ModelConfig) -> int:
    """The last dimension of a model's logits: its labels, or its vocabulary."""
    return (config.num_labels if isinstance(config, LabellingConfig) else 0) or config.vocab_size


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model, or a labelling one, that declares its decoding state.

    ``forward(tokens, state, step)`` takes tokens (batch, time) int64 and gives logits (batch, count, width) and the
    state after each row's last valid token. An empty state means: nothing came before and nothing is to be kept, which
    is how training calls it. ``step=None`` means :meth:`Step.whole`.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...

    def state_specs(self) -> Sequence[StateSpec]:
        """What the model carries from step to step."""
        ...

    def __call__(self, tokens: Tensor, state: State = ..., step: Step | None = ...) -> tuple[Tensor, State]:
        """Run one step."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """As ``nn.Module``'s."""
        ...


@runtime_checkable
class SourceModel(LanguageModel, Protocol):
    """A language model with an encoder: rows are answers, each to a source of its own.

    Its ``state_specs()`` declare, besides what steps carry, what the encoder makes of the sources: ``static`` states
    whose shape has the symbol ``source``. ``forward`` reads them in the state and does not give them back; a state that
    has nothing else is an empty one.
    """

    def encode(self, source: Tensor, lengths: Tensor) -> State:
        """The states that the encoder makes.

        Args:
            source: (batch, source) int64.
            lengths: (batch,) int32, how many tokens of each row are valid, at least 1; the rest is padding, and what is
                made of that no step may notice, be it of this row or of another.
        """
        ...


def reads_in_one_pass(config: ModelConfig) -> bool:
    """Whether a model of that configuration must be given whole rows, for their tokens see those after them."""
    return isinstance(config, OnePassConfig) and config.one_pass


def answers_sources(model: Any) -> bool:
    """Whether a model declares states that an encoder makes, and so must be a :class:`SourceModel`."""
    return any(spec.encoded for spec in model.state_specs())


def read_rows(model: Any, tokens: Tensor, sources: Tensor | None = None) -> tuple[Tensor, State]:
    """Run a model over whole rows from nothing, where what it gives is only looked at on the way.

    Args:
        model: follows :class:`LanguageModel` or :class:`SourceModel`.
        tokens: (batch, time) int64.
        sources: (batch, source), without padding; None: a model that answers sources answers the very rows.
    """
    found: tuple[Tensor, State]
    if not hasattr(model, "state_specs") or not answers_sources(model):
        found = model(tokens)
        return found
    read = tokens if sources is None else sources
    lengths = torch.full((len(read),), read.shape[1], dtype=torch.int32, device=read.device)
    found = model(tokens, model.encode(read, lengths))
    return found


def with_hidden(model: Any, tokens: Tensor, state: State, step: Step) -> tuple[Any, Tensor | None]:
    """A step of a model, and its last hidden state: of what it takes the step's positions before it projects them.

    Args:
        model: follows :class:`LanguageModel`.
        tokens: (batch, time) int64.
        state: as the model takes it.
        step: likewise.

    Returns:
        What the model gave, and (batch, time, features); None for a model that picks positions otherwise than by
        :func:`edgellm.ops.take_positions`.
    """
    with positions_noted() as seen:
        given = model(tokens, state, step)
    return given, next((x for x, positions in reversed(seen) if positions is step.logit_positions), None)


def empty_state(
    model: LanguageModel, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: Any = None
) -> dict[str, Tensor]:
    """The state of rows that hold no token yet, but for what an encoder makes.

    Args:
        model: whose state.
        batch: rows.
        capacity: slots for tokens in each row.
        dtype: overrides the specs' dtype, for a model that was cast.
        device: where.
    """
    return {
        spec.name: torch.zeros(spec.resolve(batch, capacity), dtype=dtype or getattr(torch, spec.dtype), device=device)
        for spec in model.state_specs()
        if not spec.encoded
    }
