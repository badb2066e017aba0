"""The byte-level tokenizer that a fresh model is trained with.

Byte-pair encoding over bytes (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in GPT-2, Radford et al. 2019), so
that any UTF-8 text comes back exactly as it went in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgellm.errors import TrainingError

__all__ = [
    "END_OF_TEXT",
    "MIN_VOCABULARY",
    "end_of_text_id",
    "read_tokenizer_file",
    "tokenizer_digest",
    "train_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"  # parts documents; written in a text, it parts that text into two
# What others call it, the usual ones first; a chat's end of turn is none.
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
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


def read_tokenizer_file(path: Path) -> Tokenizer:
    """A tokenizer that somebody else trained, without truncation and padding of its own.

    Raises:
        TrainingError: it cannot be read, or has no token that ends a text.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); name a tokenizer.json") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise TrainingError(f"{path} is not a tokenizer ({error}); name a tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_of_text_id(tokenizer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The token that ends a document: ours, or one of the usual names among the special tokens.

    Raises:
        TrainingError: the tokenizer has none.
    """
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    token: int | None = tokenizer.token_to_id(next((name for name in ENDS if name in special), END_OF_TEXT))
    if token is None:
        raise TrainingError(
            f"the tokenizer has no special token that ends a text ({', '.join(ENDS)}); add one, to part documents with"
        )
    return token


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON, in hex."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
