"""Reading the small files of a checkpoint, with one kind of error for whatever is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgellm.errors import CheckpointError

__all__ = ["plain_tokenizer", "read_json", "read_text", "read_tokenizer", "token_ids", "tokenizer_errors"]


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        CheckpointError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's JSON object.

    Raises:
        CheckpointError: it cannot be read or holds something else.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, not an object; copy the checkpoint again")
    return data


def read_tokenizer(path: Path) -> str | None:
    """The text of a ``tokenizer.json`` that the tokenizers library accepts, or None where there is none.

    What the file says of truncation and padding is left out; see :func:`plain_tokenizer`.

    Raises:
        CheckpointError: the library does not accept it.
    """
    if not path.exists():
        return None
    text = read_text(path)
    with tokenizer_errors(f"{path} is not a tokenizer", "copy the checkpoint again"):
        tokenizer = Tokenizer.from_str(text)
        if tokenizer.truncation is None and tokenizer.padding is None:
            return text  # byte for byte as it is
        plain: str = plain_tokenizer(tokenizer).to_str()
    return plain


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation or padding of its own, which would silently shorten or lengthen every text.

    Args:
        tokenizer: changed in place.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def tokenizer_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into a CheckpointError; it has no class of its own for it."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # a panic in the library's Rust code is no Exception and its class cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} ({error}); {remedy}") from error


def token_ids(data: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    """The token ids under ``key``, which may be absent, null, one or a list.

    Raises:
        CheckpointError: something there is not a token id.
    """
    value = data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or i < 0:
            raise CheckpointError(f"{path}: {key} is {value!r}; token ids are whole numbers from 0")
    return tuple(dict.fromkeys(ids))
