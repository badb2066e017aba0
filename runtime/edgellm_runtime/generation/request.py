"""One call of ``generate``: what it runs, and which of the answers it gives in what form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.generation.generate import Run
from edgellm_runtime.generation.options import GenerationOptions

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

    def of(self, options: GenerationOptions) -> GenerationOptions:
        """The options of the run: a seed for each answer, and the probabilities by which the best are known."""
        if self.best_of is not None and options.logprobs is None:
            options = replace(options, logprobs=0)
        if self.made > 1 and isinstance(options.seed, int):
            return replace(options, seed=[options.seed + i for i in range(self.made)])
        return options

    def check_single(self, given_state: bool, prompts: int) -> None:
        """Refuse for a list of prompts what goes with one.

        Args:
            given_state: whether a state was given too.
            prompts: how many there are.
        """
        if not given_state and self.n is None and self.best_of is None:
            return
        given = "a state" if given_state else f"n of {self.n}" if self.n is not None else f"best_of of {self.best_of}"
        raise OptionError(f"{given} goes with one prompt, but there is a list of {prompts}; call it for each")


class Request:
    """A call that is to be run.

    Args:
        run: of all its rows; None for a list of no prompts.
        prompts: how many prompts it has; None: one, by itself.
        counts: of answers.
        options: as they were given.
    """

    def __init__(self, run: Run | None, prompts: int | None, counts: Counts, options: GenerationOptions) -> None:
        self._run, self._prompts, self._counts, self._options = run, prompts, counts, options

    def cancel(self) -> None:
        """End every answer where it is; any thread may call it."""
        if self._run is not None:
            self._run.cancel()

    def answer(self) -> Generation | list[Generation]:
        """Run it to its end."""
        if self._run is None:
            return []
        for _ in self._run.chunks():
            pass
        rows = self._counts.made if self._prompts is None else self._prompts
        results: Sequence[Generation] = [self._run.result(row) for row in range(rows)]
        if self._counts.best_of is not None:
            results = sorted(results, key=_likelihood, reverse=True)[: self._counts.n or 1]  # stable: the first of ties
        if self._options.logprobs is None:
            results = [result if result.logprobs is None else replace(result, logprobs=None) for result in results]
        return results[0] if self._prompts is None and self._counts.n is None else list(results)


def _likelihood(answer: Generation) -> float:
    """Mean log-probability of its tokens, by which ``best_of`` chooses; an empty answer is the least likely."""
    found = answer.logprobs
    return sum(place.logprob for place in found) / len(found) if found else -float("inf")
