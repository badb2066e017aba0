"""The byte-level tokenizer that a fresh model is trained with.

Byte-pair encoding over bytes (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2, Radford et al. 2019), so
that any UTF-8 text comes back exactly as it went in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgellm.errors import TrainingError

__all__ = ["END_OF_TEXT", "MIN_VOCABULARY", "end_of_text_id", "tokenizer_digest", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"  # parts documents; written in a text, it parts that text into two
MIN_VOCABULARY = 257  # every byte and END_OF_TEXT


def train_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: pieces of text, streamed once; ``edgellm.training.corpus.Corpus.train`` gives those of files.
        vocab_size: the most tokens; a small text may give fewer. Token 0 is :data:`END_OF_TEXT`.
        special: names of further special tokens.

    Raises:
        TrainingError: no text, or a vocabulary that cannot hold every byte.
    """
    if vocab_size < MIN_VOCABULARY:
        raise TrainingError(f"vocab_size is {vocab_size}; every byte needs a token, so at least {MIN_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def pieces() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(pieces(), trainer)
    if not seen:
        raise TrainingError("the text to train a tokenizer on is empty; give at least one file with text in it")
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token that ends a document.

    Raises:
        TrainingError: the tokenizer has none.
    """
    token: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise TrainingError(
            f"the tokenizer has no {END_OF_TEXT} token; add it as a special token, to part documents with"
        )
    return token


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON, in hex."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
