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

__all__ = ["CountPenalty", "LogitBias", "MinTokens", "NoRepeatNgram", "chain_of"]


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
    """

    def __init__(self, presence: float, frequency: float, start: int) -> None:
        self._presence, self._frequency, self._start = presence, frequency, start

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        import numpy as np

        ids, counts = np.unique(tokens[self._start :], return_counts=True)
        logits[ids] -= (self._presence + self._frequency * counts).astype(np.float32)


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
    named = {"logit_bias": o.logit_bias, "banned_tokens": o.banned_tokens}
    for name, tokens in named.items():
        if tokens and max(tokens) >= vocab_size:
            raise OptionError(f"{name} has token {max(tokens)}, outside the vocabulary of {vocab_size}; name its own")
    made: list[tuple[object, LogitsProcessor]] = [
        (o.logit_bias, LogitBias(o.logit_bias or {})),
        (o.repetition_penalty != 1, RepetitionPenalty(o.repetition_penalty)),
        (o.presence_penalty or o.frequency_penalty, CountPenalty(o.presence_penalty, o.frequency_penalty, answer_from)),
        (o.no_repeat_ngram, NoRepeatNgram(o.no_repeat_ngram)),
        (o.banned_tokens, LogitBias(dict.fromkeys(o.banned_tokens, -float("inf")))),
        (o.min_tokens and ends, MinTokens(ends, prompt + o.min_tokens)),
    ]
    return (*o.logits_processors, *(processor for wanted, processor in made if wanted))
