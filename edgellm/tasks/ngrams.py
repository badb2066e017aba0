"""Text without a neural network: how well counts of tokens and of token triples predict the next one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NGrams"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_DISCOUNT = 0.75  # taken from every count that was seen; the usual value between 0.5 and 1


class NGrams:
    """Unigram and trigram models over the same tokens.

    The trigram is interpolated Kneser-Ney (Kneser and Ney, 1995; Chen and Goodman, 1999) with one discount: each order
    gives a part of its probability to the next lower one, whose counts are of distinct contexts, and the lowest gives
    its part to every token alike. The unigram is the token's share of the text, each count one larger.

    Args:
        tokens: the training text.
        vocab_size: how many tokens there are; below two million, so that three fit into 64 bits.

    Raises:
        ValueError: fewer than three tokens, or one outside the vocabulary.
    """

    def __init__(self, tokens: Ints, vocab_size: int) -> None:
        tokens = np.asarray(tokens, dtype=np.int64)
        if len(tokens) < 3 or tokens.min() < 0 or tokens.max() >= vocab_size or vocab_size > 2_000_000:
            raise ValueError(f"{len(tokens)} tokens of a vocabulary of {vocab_size}; at least three, all inside it")
        self._size = v = vocab_size
        counts = np.bincount(tokens, minlength=v).astype(np.float64)
        self._unigram = (counts + 1) / (len(tokens) + v)
        keys = (tokens[:-2] * v + tokens[1:-1]) * v + tokens[2:]
        self._triples = _Order(keys, v)
        self._pairs = _Order(self._triples.keys % (v * v), v)  # each pair as often as it has contexts
        single, contexts = np.unique(self._pairs.keys % v, return_counts=True)
        lowest = np.zeros(v)
        lowest[single] = (contexts - _DISCOUNT) / contexts.sum()
        self._lowest = lowest + _DISCOUNT * len(single) / contexts.sum() / v

    def unigram_nats(self, row: Ints) -> Floats:
        """Nats of each token of a row but the first."""
        result: Floats = -np.log(self._unigram[np.asarray(row)[1:]])
        return result

    def trigram_nats(self, row: Ints) -> Floats:
        """Nats of each token of a row but the first; the second is predicted from one token."""
        row = np.asarray(row, dtype=np.int64)
        v = self._size
        two = self._pairs.interpolate(row[:-1], row[1:], self._lowest[row[1:]])
        three = self._triples.interpolate(row[:-2] * v + row[1:-1], row[2:], two[1:])
        result: Floats = -np.log(np.concatenate([two[:1], three]))
        return result


class _Order:
    """Counts of one order; a key is its context times the vocabulary, plus its token."""

    def __init__(self, keys: Ints, vocab_size: int) -> None:
        self.keys, self._counts = np.unique(keys, return_counts=True)
        self._size = vocab_size
        self._contexts, first = np.unique(self.keys // vocab_size, return_index=True)
        self._totals = np.add.reduceat(self._counts, first)
        self._kinds = np.diff(np.append(first, len(self.keys)))

    def interpolate(self, contexts: Ints, tokens: Ints, lower: Floats) -> Floats:
        """Probabilities of tokens after contexts, given those of the next lower order."""
        total, kinds = (_look_up(self._contexts, values, contexts) for values in (self._totals, self._kinds))
        count = _look_up(self.keys, self._counts, contexts * self._size + tokens)
        known = np.maximum(total, 1)
        found = (np.maximum(count - _DISCOUNT, 0) + _DISCOUNT * kinds * lower) / known
        return np.where(total > 0, found, lower)


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """The value of each wanted key, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
