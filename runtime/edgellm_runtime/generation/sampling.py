"""Choosing the next token from logits: greedy, or a draw from the filtered distribution.

First the chain of processors changes the logits: the caller's in their order, then those of the options. The filters
follow in the field's usual order: temperature, top-k, top-p, min-p, typical. The draw is from what is left,
renormalised. NumPy only; it knows nothing of text, states or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import BackendError, OptionError
from edgellm_runtime.generation.penalties import chain_of
from edgellm_runtime.generation.processors import LogitsProcessor, apply_processors
from edgellm_runtime.generation.sampling_options import SamplingOptions

__all__ = ["Sampler", "SamplingOptions", "top_ids"]

_Weighted = tuple[NDArray[np.int64], NDArray[np.float32]]
_GROUP = 64  # weights summed together before a draw looks inside
_STRIPES = 16  # a vocabulary is compared with itself in so many stripes to find a bound for its k-th greatest
_FIRST_GUESS = 256  # tokens that top-p sorts before it looks at more


class _Held:
    """The tokens of a row, in an array that grows."""

    def __init__(self) -> None:
        self._array = np.empty(256, dtype=np.int64)
        self._length = 0

    def add(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Note more tokens."""
        end = self._length + len(tokens)
        if end > len(self._array):
            self._array = np.concatenate([self._array, np.empty(end, dtype=np.int64)])
        self._array[self._length : end] = tokens
        self._length = end

    def view(self) -> NDArray[np.int64]:
        """All of them; not to be written."""
        found = self._array[: self._length]
        found.flags.writeable = False
        return found


class Sampler:
    """Chooses one token for each row of a batch.

    Each row owns a PCG64 generator begun from the same seed, so a row's draws are what it would get alone, whatever
    its neighbours do. Ties are broken by token id, never by the order a sort happens to leave, so that a seed gives
    the same tokens on every platform.

    Args:
        options: how to choose.
        rows: the batch size.
        vocab_size: length of a row of logits.
        ends: the tokens that end an answer, for ``min_tokens``.

    Raises:
        OptionError: another number of seeds than of rows, or a token that the model does not have.
    """

    def __init__(self, options: SamplingOptions, *, rows: int, vocab_size: int, ends: Collection[int] = ()) -> None:
        self.options = options
        self._greedy = options.temperature == 0
        self._vocab_size, self._ends = vocab_size, ends
        self._chains = [self._chain_of(0, 0)] * rows
        self._changes = bool(self._chains and self._chains[0])
        seeds = options.seed if isinstance(options.seed, Sequence) else [options.seed] * rows
        if len(seeds) != rows:
            raise OptionError(f"seed has {len(seeds)} numbers for {rows} rows; give one, or one for each")
        self._draws = [] if self._greedy else [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self._all = np.arange(0 if self._greedy else vocab_size)
        self._held = [_Held() for _ in range(rows)] if self._changes else []

    def _chain_of(self, prompt: int, answer_from: int) -> Sequence[LogitsProcessor]:
        return chain_of(
            self.options, vocab_size=self._vocab_size, ends=self._ends, prompt=prompt, answer_from=answer_from
        )

    def observe(self, row: int, prompt: Sequence[int], answer_from: int | None = None) -> None:
        """Tell the processors a row's prompt; chosen tokens are noted without being told.

        Args:
            row: which.
            prompt: its tokens.
            answer_from: how many of them come before its answer; None: all.
        """
        if self._changes:
            self._held[row].add(prompt)
            self._chains[row] = self._chain_of(len(prompt), len(prompt) if answer_from is None else answer_from)

    def __call__(self, logits: NDArray[np.float32], rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Choose a token for each row.

        Args:
            logits: (batch, vocab); left as it is.
            rows: which rows these are, when some have left the batch; None means all.

        Returns:
            (batch,) token ids.

        Raises:
            BackendError: a row's best logit is NaN or infinite.
            OptionError: a logits processor returned no logits, or left no token.
        """
        if self._greedy and not self._changes:
            best: NDArray[np.int64] = logits.argmax(axis=-1)
            for row, token in enumerate(best):
                _check_best(logits[row, token])
            return best
        indices = range(len(logits)) if rows is None else rows
        return np.array([self._choose(row, x) for row, x in zip(indices, logits, strict=True)], dtype=np.int64)

    @property
    def deciding(self) -> int | None:
        """How many of the most likely tokens settle a choice, with one more to tell ties; None: all of them.

        Processors may raise any token, so they are given all.
        """
        if self._changes:
            return None
        if self._greedy or self.options.top_k == 1:
            return 1
        return self.options.top_k + 1 if self.options.top_k else None

    def among(
        self, ids: NDArray[np.int64], logits: NDArray[np.float32], rows: Sequence[int],
        everything: Callable[[], NDArray[np.float32]],
    ) -> NDArray[np.int64]:  # fmt: skip
        """Choose from the most likely tokens just as from all of them.

        Args:
            ids: (batch, deciding), the likeliest first.
            logits: (batch, deciding), theirs.
            rows: which rows these are.
            everything: gives the logits (batch, vocab), for a row where equals at the end of the list could change
                the choice.

        Returns:
            (batch,) token ids.

        Raises:
            BackendError: a row's best logit is NaN or infinite.
        """
        for best in logits[:, 0]:
            _check_best(best)
        if self.deciding == 1:
            return ids[:, 0].copy()
        if (logits[:, -2] == logits[:, -1]).any():
            return self(everything(), rows)
        chosen = []
        for row, some, values in zip(rows, ids[:, :-1], logits[:, :-1], strict=True):
            order = np.argsort(some)
            ids_of_row, weights = self._filtered(some[order], values[order])
            chosen.append(self._drawn(row, ids_of_row, weights))
        return np.array(chosen, dtype=np.int64)

    def distribution(
        self, logits: NDArray[np.float32], *, row: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What a draw for this row would choose from.

        Args:
            logits: (vocab,).
            row: whose tokens the processors are given.

        Returns:
            Token ids in rising order, and their probabilities, which sum to 1.
        """
        ids, weights = self._weights(row, logits)
        return ids, weights / weights.sum(dtype=np.float64)

    def _choose(self, row: int, logits: NDArray[np.float32]) -> int:
        token = self._drawn(row, *self._weights(row, logits))
        if self._changes:
            self._held[row].add([token])
        return token

    def _drawn(self, row: int, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> int:
        return int(ids[0]) if len(ids) == 1 else _draw(ids, weights, self._draws[row].random())

    def _weights(self, row: int, logits: NDArray[np.float32]) -> _Weighted:
        """The tokens that survive the filters and their unnormalised probabilities, the best being 1; ids rise."""
        o = self.options
        if self._changes:
            logits = apply_processors(self._chains[row], self._held[row].view(), logits)
        best = int(logits.argmax())
        _check_best(logits[best])
        if self._greedy or o.top_k == 1:
            return np.array([best]), np.ones(1, dtype=np.float32)
        ids = top_ids(logits, o.top_k) if 0 < o.top_k < len(logits) else None  # None: all of them, in order
        return self._filtered(ids, logits if ids is None else logits[ids], logits[best])

    def _filtered(
        self, ids: NDArray[np.int64] | None, logits: NDArray[np.float32], best: np.float32 | None = None
    ) -> _Weighted:
        """Temperature, top-p, min-p and typical over tokens that top-k has left; ids rise, None are all."""
        o = self.options
        weights = logits - (logits.max() if best is None else best)
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity, as it should
            weights /= np.float32(max(o.temperature, 1e-30))  # in place: fresh memory costs more than the arithmetic
            np.exp(weights, out=weights)
        typical = o.typical_p if o.typical_p < 1 else None
        filters = ((_top_p, o.top_p if o.top_p < 1 else None), (_min_p, o.min_p or None), (_typical, typical))
        for keep, share in filters:
            if share is not None:
                chosen = keep(weights, share)
                ids, weights = chosen if ids is None else ids[chosen], weights[chosen]
        return ids if ids is not None else self._all, weights


def _check_best(value: np.float32) -> None:
    if not math.isfinite(value):
        raise BackendError(f"the model's best logit is {value}; verify the bundle on this device, then export it again")


def top_ids(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The ids of the k greatest, in rising order; of equals the lower ids."""
    near = _at_leasttop_ids(values, k)
    kept = values[near]
    threshold = np.partition(kept, len(kept) - k)[len(kept) - k]
    above, equal = near[kept > threshold], near[kept == threshold]
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def _at_leasttop_ids(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids that the k greatest are among, usually few; a partition of the whole vocabulary costs ten times as much."""
    groups = len(values) // _STRIPES
    if k > groups // 2:
        return np.arange(len(values))
    best = values[: groups * _STRIPES].reshape(_STRIPES, groups).max(axis=0)
    # k groups have a member at or above this, so the k-th greatest of all is not below it
    return np.flatnonzero(values >= np.partition(best, groups - k)[groups - k])


def _top_p(weights: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    """Indices, rising, of the fewest greatest weights that make up the share p; of equals the lower indices."""
    wanted = p * weights.sum(dtype=np.float64)
    count = _FIRST_GUESS
    while True:
        # sorting a whole vocabulary costs ten times this, and the share is nearly always reached among a few
        ids = top_ids(weights, count) if count < len(weights) else np.arange(len(weights))
        ids = ids[np.argsort(-weights[ids], kind="stable")]
        cumulative = weights[ids].cumsum(dtype=np.float64)
        if cumulative[-1] >= wanted or len(ids) == len(weights):
            return np.sort(ids[: int(np.searchsorted(cumulative, wanted)) + 1])
        count *= 4


def _min_p(weights: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    """Indices of the weights of at least p; the best weighs 1, and no normalisation changes a ratio."""
    return np.flatnonzero(weights >= p)


def _typical(weights: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    """Indices, rising, of the fewest weights nearest to the entropy that make up the share p; of equals the lower."""
    shares = weights / weights.sum(dtype=np.float64)
    with np.errstate(divide="ignore"):
        surprise = -np.log(shares)
    entropy = float((shares[shares > 0] * surprise[shares > 0]).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    cumulative = shares[order].cumsum()
    return np.sort(order[: int(np.searchsorted(cumulative, p * cumulative[-1])) + 1])


def _draw(ids: NDArray[np.int64], weights: NDArray[np.float32], u: float) -> int:
    """Invert the cumulative distribution at u, in [0, 1)."""
    # First the group, then the place in it: a cumulative sum waits for every addition, a sum of groups does not.
    groups = len(weights) // _GROUP
    sums = weights[: groups * _GROUP].reshape(groups, _GROUP).sum(axis=1, dtype=np.float64)
    sums = np.append(sums, weights[groups * _GROUP :].sum(dtype=np.float64))
    group, left = _invert(sums, u * float(sums.sum()))
    inside = weights[group * _GROUP : (group + 1) * _GROUP].astype(np.float64)
    index, _ = _invert(inside, left)
    return int(ids[group * _GROUP + index])


def _invert(weights: NDArray[np.float64], at: float) -> tuple[int, float]:
    """Where the running sum first exceeds ``at``, and what of ``at`` is left there; never at a weight of 0."""
    cumulative = weights.cumsum()
    # rounding may put `at` at the total itself: then the last place that has any weight
    index = min(int(np.searchsorted(cumulative, at, side="right")), int(np.searchsorted(cumulative, cumulative[-1])))
    return index, at - float(cumulative[index - 1]) if index else at
