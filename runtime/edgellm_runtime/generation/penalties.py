"""The processors behind the options: bias, bans, penalties of what a row holds, and no end before so many tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.processors import LogitsProcessor, RepetitionPenalty

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellm_runtime.generation.sampling_options import SamplingOptions

__all__ = ["CountPenalty", "ForcedTokens", "LogitBias", "MinTokens", "NoRepeatNgram", "Windowed", "chain_of"]


class LogitBias:
    """Adds to the logits of some tokens.

    Args:
        bias: token id to what is added; minus infinity forbids it.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        import numpy as np

        self._ids = np.array(list(bias), dtype=np.int64)
        self._values = np.array(list(bias.values()), dtype=np.float32)

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        logits[self._ids] += self._values


class CountPenalty:
    """Lowers the logits of the tokens of an answer: by a presence penalty, and a frequency penalty for each time.

    The convention is that of OpenAI's interface: only what the answer holds counts, not its prompt.

    Args:
        presence: for a token that is there.
        frequency: for each time that it is there.
        start: how many tokens come before the answer.
        window: only so many of the last tokens count; 0: all.
    """

    def __init__(self, presence: float, frequency: float, start: int, window: int = 0) -> None:
        self._presence, self._frequency, self._start, self._window = presence, frequency, start, window

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        import numpy as np

        start = max(self._start, len(tokens) - self._window) if self._window else self._start
        ids, counts = np.unique(tokens[start:], return_counts=True)
        logits[ids] -= (self._presence + self._frequency * counts).astype(np.float32)


class Windowed:
    """A processor that is shown only the last tokens of a row.

    Args:
        processor: what it shows them to.
        window: how many.
    """

    def __init__(self, processor: LogitsProcessor, window: int) -> None:
        self._processor, self._window = processor, window

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> NDArray[np.float32] | None:
        """See :class:`LogitsProcessor`."""
        return self._processor(tokens[-self._window :], logits)


class ForcedTokens:
    """Leaves an answer's first tokens no choice.

    Args:
        forced: its first tokens.
        start: how many tokens the row holds before them.
    """

    def __init__(self, forced: Sequence[int], start: int) -> None:
        self._forced, self._start = forced, start

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        at = len(tokens) - self._start
        if at < len(self._forced):
            logits[:] = -float("inf")
            logits[self._forced[at]] = 0


class NoRepeatNgram:
    """Forbids every token that would end a run of tokens which the row already holds (Paulus 2017, arXiv:1705.04304).

    Args:
        size: of the runs.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        import numpy as np

        before = self._size - 1  # tokens of a run that are there when its last one is chosen
        runs = len(tokens) - before
        if runs < 1:
            return
        same = np.ones(runs, dtype=np.bool_)
        for at, token in enumerate(tokens[runs:]):
            same &= tokens[at : at + runs] == token
        logits[tokens[before:][same]] = -np.inf


class MinTokens:
    """Forbids the tokens that end an answer while it is shorter than it must be.

    Args:
        ends: the tokens.
        until: how many tokens the row must hold first, its prompt's among them.
    """

    def __init__(self, ends: Collection[int], until: int) -> None:
        self._ends, self._until = sorted(ends), until

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        if len(tokens) < self._until:
            logits[self._ends] = -float("inf")


def chain_of(
    options: SamplingOptions, *, vocab_size: int, ends: Collection[int], prompt: int, answer_from: int
) -> Sequence[LogitsProcessor]:
    """What changes a row's logits, in order: the caller's processors, then those of the options that are not idle.

    Args:
        options: of the run.
        vocab_size: length of a row of logits.
        ends: the tokens that end an answer.
        prompt: how many tokens the row's prompt has.
        answer_from: how many tokens come before its answer, which a prompt may have begun.

    Raises:
        OptionError: an option names a token that the model does not have.
    """
    o = options
    named = {"logit_bias": o.logit_bias, "banned_tokens": o.banned_tokens, "forced_tokens": o.forced_tokens}
    for name, tokens in named.items():
        if tokens and max(tokens) >= vocab_size:
            raise OptionError(f"{name} has token {max(tokens)}, outside the vocabulary of {vocab_size}; name its own")
    repetition = RepetitionPenalty(o.repetition_penalty)
    counting = CountPenalty(o.presence_penalty, o.frequency_penalty, answer_from, o.penalty_window)
    made: list[tuple[object, LogitsProcessor]] = [
        (o.logit_bias, LogitBias(o.logit_bias or {})),
        (o.repetition_penalty != 1, Windowed(repetition, o.penalty_window) if o.penalty_window else repetition),
        (o.presence_penalty or o.frequency_penalty, counting),
        (o.no_repeat_ngram, NoRepeatNgram(o.no_repeat_ngram)),
        (o.banned_tokens, LogitBias(dict.fromkeys(o.banned_tokens, -float("inf")))),
        (o.min_tokens and ends, MinTokens(ends, prompt + o.min_tokens)),
        (o.forced_tokens, ForcedTokens(o.forced_tokens, prompt)),  # last: what is forced is banned by nothing
    ]
    form = () if o.grammar is None else (o.grammar.matcher(answer_from),)  # after all: nothing may lift what it forbids
    return (*o.logits_processors, *(processor for wanted, processor in made if wanted), *form)
