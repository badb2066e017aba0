"""A corpus as two files of token ids, memory-mapped, so that it may be bigger than memory.

``train.bin`` and ``validation.bin`` are little-endian uint16 (uint32 above 65,536 tokens), documents ended by
end-of-text; ``data.json`` says what they were made from and is written last, so that it vouches for whole files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgellm.checkpoints.files import plain_tokenizer
from edgellm.errors import TrainingError
from edgellm.training.corpus import Corpus, Piece
from edgellm.training.tokenizer import end_of_text_id, tokenizer_digest

__all__ = ["TokenData", "Tokens", "prepare_tokens"]

Tokens = npt.NDArray[np.unsignedinteger[Any]]
FORMAT = 1
HEADER = "data.json"
PARTS = ("train", "validation")
BATCH_PIECES = 128  # pieces, of at most about 64 KiB in plain text, that are encoded at once


@dataclass(frozen=True)
class TokenData:
    """Token ids to train and to validate on.

    Args:
        train: (tokens,) unsigned ints, in memory or memory-mapped.
        validation: as ``train``, held out.
        vocab_size: ids are below this.
        fingerprint: a digest of the tokens; a run resumes only with the same one. Empty: not checked.
        split: how validation was chosen, in words.
    """

    train: Tokens
    validation: Tokens
    vocab_size: int
    fingerprint: str = ""
    split: str = "given"

    def check(self, context: int) -> None:
        """Make sure that windows fit.

        Args:
            context: tokens in a window; each also needs the token after it.

        Raises:
            TrainingError: a part is too short.
        """
        for name, part in zip(PARTS, (self.train, self.validation), strict=True):
            if len(part) == 0:
                raise TrainingError(f"the {name} text is empty; give more text")
            if len(part) <= context:
                raise TrainingError(
                    f"the {name} text is too short: {len(part)} tokens for a context of {context}; give more text, "
                    "hold out a larger part or lower the context"
                )


def prepare_tokens(
    corpus: Corpus, tokenizer: Tokenizer, directory: Path, *, end: int | None = None
) -> TokenData:  # fmt: skip
    """Encode a corpus into a directory, or reuse what is there when files, split and tokenizer are the same.

    Args:
        corpus: the text.
        tokenizer: has an end-of-text token; its own truncation and padding are taken from it.
        directory: made if needed; holds nothing else.
        end: the token that ends a document; None: the tokenizer's end-of-text token.

    Raises:
        TrainingError: text that cannot be read.
    """
    plain_tokenizer(tokenizer)
    source = {
        "format": FORMAT,
        "files": corpus.fingerprint(),
        "split": corpus.split,
        "validation_fraction": corpus.validation_fraction,
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "vocab_size": tokenizer.get_vocab_size(),
        "end": end_of_text_id(tokenizer) if end is None else end,
    }
    header = _read_header(directory)
    if header is None or any(header.get(key) != value for key, value in source.items()):
        header = _write(corpus, tokenizer, directory, source)
    return _open(directory, header)


def _read_header(directory: Path) -> dict[str, Any] | None:
    """The header, or None when it is not there, damaged or its files are not the ones it tells of."""
    try:
        header: dict[str, Any] = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        width = np.dtype(header["dtype"]).itemsize
        whole = all((directory / f"{p}.bin").stat().st_size == header["tokens"][p] * width for p in PARTS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return header if whole else None


def _open(directory: Path, header: dict[str, Any]) -> TokenData:
    def part(name: str) -> Tokens:
        if not header["tokens"][name]:  # an empty file cannot be mapped
            return np.zeros(0, header["dtype"])
        return np.memmap(directory / f"{name}.bin", dtype=header["dtype"], mode="r")

    digest = hashlib.sha256("".join(header["sha256"][name] for name in PARTS).encode()).hexdigest()
    return TokenData(part("train"), part("validation"), header["vocab_size"], digest, header["split"])


@dataclass
class _Part:
    """A token file that is being written."""

    file: BinaryIO
    dtype: np.dtype[Any]
    count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, ids: list[int]) -> None:
        data = np.asarray(ids, self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.count += len(ids)


def _write(corpus: Corpus, tokenizer: Tokenizer, directory: Path, source: dict[str, Any]) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / HEADER).unlink(missing_ok=True)  # from here on the files that are there have nobody to vouch for them
    dtype = np.dtype("<u2" if source["vocab_size"] <= 1 << 16 else "<u4")
    temporary = {name: directory / f"{name}.bin.tmp" for name in PARTS}
    with temporary["train"].open("wb") as train, temporary["validation"].open("wb") as validation:
        parts = [_Part(train, dtype), _Part(validation, dtype)]
        for batch in _batched(corpus.pieces(), BATCH_PIECES):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                parts[piece.validation].add(encoding.ids + ([source["end"]] if piece.ends_document else []))
    for name in PARTS:
        temporary[name].replace(directory / f"{name}.bin")
    named = dict(zip(PARTS, parts, strict=True))
    header = source | {
        "dtype": dtype.str,
        "tokens": {name: part.count for name, part in named.items()},
        "sha256": {name: part.digest.hexdigest() for name, part in named.items()},
    }
    pending = directory / f"{HEADER}.tmp"
    pending.write_text(json.dumps(header, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    pending.replace(directory / HEADER)
    return header


def _batched(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
