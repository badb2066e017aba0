"""One call of ``generate``: what it runs, and which of the answers it gives in what form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.generation.generate import Run
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.generation.row_options import RowOptions

__all__ = ["Counts", "Request"]

_MOST_ANSWERS = 2**16


@dataclass(frozen=True)
class Counts:
    """How many answers are made to one prompt, and how many of them are given.

    Args:
        n: are given, as a list; None: one, by itself.
        best_of: are made, of which the likeliest are given; None: as many as are given.

    Raises:
        OptionError: not whole numbers, or fewer made than given.
    """

    n: int | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        given = 1 if self.n is None else check_integer("n", self.n, 1, _MOST_ANSWERS)
        if self.best_of is not None:
            check_integer("best_of", self.best_of, given, _MOST_ANSWERS)

    @property
    def made(self) -> int:
        """How many rows one prompt becomes."""
        return self.best_of or self.n or 1

    def of(self, options: GenerationOptions, rows: Sequence[GenerationOptions] | None, prompts: int) -> RowOptions:
        """The options of the run: a seed for each answer, and the probabilities by which the best are known.

        Args:
            options: of the call.
            rows: of each prompt, where they differ.
            prompts: how many there are.
        """

        def noted(options: GenerationOptions) -> GenerationOptions:
            asked = self.best_of is not None and options.logprobs is None
            return replace(options, logprobs=0) if asked else options

        options = noted(options)
        if rows is not None:
            own = [replace(noted(o), seed=_seed(o, 0, a)) for a in range(self.made) for o in rows]
            return RowOptions(options, own)
        if self.made > 1 and options.seed is not None:
            _check_seeds(options, prompts)
            options = replace(options, seed=[_seed(options, p, a) for a in range(self.made) for p in range(prompts)])
        return RowOptions(options)

    def check_single(self, given_state: bool, prompts: int) -> None:
        """Refuse for a list of prompts what goes with one.

        Args:
            given_state: whether a state was given too.
            prompts: how many there are.
        """
        if given_state:
            raise OptionError(f"a state goes with one prompt, but there is a list of {prompts}; call it for each")


def _seed(options: GenerationOptions, prompt: int, answer: int) -> Any:
    seed = options.seed[prompt] if isinstance(options.seed, Sequence) else options.seed
    return None if seed is None else seed + answer


def _check_seeds(options: GenerationOptions, prompts: int) -> None:
    if isinstance(options.seed, Sequence) and len(options.seed) != prompts:
        raise OptionError(f"seed has {len(options.seed)} numbers for {prompts} prompts; give one, or one for each")


class Request:
    """A call that is to be run.

    Args:
        run: of all its rows; None for a list of no prompts.
        prompts: how many prompts it has; None: one, by itself.
        counts: of answers.
        options: as they were given.
        rows: of each prompt, where they differ.
    """

    def __init__(
        self, run: Run | None, prompts: int | None, counts: Counts, options: GenerationOptions,
        rows: Sequence[GenerationOptions] | None = None,
    ) -> None:  # fmt: skip
        self._run, self._prompts, self._counts, self._options, self._rows = run, prompts, counts, options, rows

    def cancel(self) -> None:
        """End every answer where it is; any thread may call it."""
        if self._run is not None:
            self._run.cancel()

    def answer(self) -> Any:
        """Run it to its end: an answer, a list of them, or a list of lists."""
        if self._run is None:
            return []
        for _ in self._run.chunks():
            pass
        prompts = 1 if self._prompts is None else self._prompts
        found = [[self._run.result(a * prompts + p) for a in range(self._counts.made)] for p in range(prompts)]
        given = [self._chosen(answers, prompt) for prompt, answers in enumerate(found)]
        each = [answers[0] if self._counts.n is None else answers for answers in given]
        return each[0] if self._prompts is None else each

    def _chosen(self, answers: Sequence[Generation], prompt: int) -> list[Generation]:
        """Those that are given, of all to one prompt; stable: the first of ties."""
        if self._counts.best_of is not None:
            answers = sorted(answers, key=_likelihood, reverse=True)[: self._counts.n or 1]
        if self._wanted(prompt).logprobs is None:
            answers = [answer if answer.logprobs is None else replace(answer, logprobs=None) for answer in answers]
        return list(answers)

    def _wanted(self, prompt: int) -> GenerationOptions:
        return self._options if self._rows is None else self._rows[prompt]


def _likelihood(answer: Generation) -> float:
    """Mean log-probability of its tokens, by which ``best_of`` chooses; an empty answer is the least likely."""
    found = answer.logprobs
    return sum(place.logprob for place in found) / len(found) if found else -float("inf")
