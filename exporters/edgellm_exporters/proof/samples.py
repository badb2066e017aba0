"""The rows of tokens that goldens are taken from: real sentences where there is a tokenizer, fixed draws where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["GoldenRows", "golden_rows"]

_ROW = 48
_TEXTS = (
    "The lighthouse keeper wrote a letter every evening, though the boat came only twice a month. He told his sister "
    "about the storms, the birds that rested on the railing, and the colour of the water before rain.",
    "To bake bread you need flour, water, salt and time: 500 g of flour take about 350 ml of water and 10 g of salt. "
    "Mix them, wait an hour, fold the dough 3 times, then bake it at 230 degrees until it sounds hollow.",
)


class GoldenRows(NamedTuple):
    """Rows of token ids, and what to tell people where they are no text."""

    rows: list[list[int]]
    note: str

    def answering(self, start: Sequence[int], max_source: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows for a model that answers sources: they begin with ``start``; and their sources, of unequal lengths."""
        answers = [[*start, *row[len(start) :]][: max(len(row), len(start) + 1)] for row in self.rows]
        sources = [row[: max(1, min(max_source, len(row)) - 5 * i)] for i, row in enumerate(reversed(self.rows))]
        return answers, sources


def golden_rows(tokenizer_json: str | None, vocab_size: int, max_context: int) -> GoldenRows:
    """Two rows of one length, at most 48 tokens, so that they can run together.

    Args:
        tokenizer_json: a tokenizer to encode sentences with, or None.
        vocab_size: tokens are below it.
        max_context: rows leave at least half of it free.
    """
    length = max(2, min(_ROW, max_context // 2))
    why = "there is no tokenizer"
    if tokenizer_json is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.no_truncation()  # a file may ask for these too
        tokenizer.no_padding()
        rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in _TEXTS]
        shortest = min(length, *map(len, rows))
        if shortest > 1 and max(map(max, rows)) < vocab_size:
            return GoldenRows([row[:shortest] for row in rows], "")
        why = "the tokenizer makes no tokens of English sentences"
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, vocab_size, length).tolist() for _ in _TEXTS]
    return GoldenRows(drawn, f"goldens are random token ids and no text, for {why}")
