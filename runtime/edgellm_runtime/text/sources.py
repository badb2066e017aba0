"""Token ids as a step wants them: arrays of whole numbers, sources padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_integers, check_list, shown
from edgellm_runtime.bundle.encoder_info import EncoderInfo
from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.text.tokenizer import check_tokens

__all__ = ["padded_sources", "whole_numbers"]


def padded_sources(
    sources: Sequence[Sequence[int] | NDArray[np.integer[Any]]] | None,
    encoder: EncoderInfo | None,
    vocab_size: int,
    room: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Sources of an encoder in one array.

    Args:
        sources: token ids of each row.
        encoder: of the model; None: it has none.
        vocab_size: ids are below it.
        room: tokens that there is room for at least, be it padding in every row.

    Returns:
        Token ids (rows, longest source), padded at the end, and how many of each row are valid.

    Raises:
        OptionError: the model has no encoder, or no sources are given, or one is empty or no list of token ids.
        ContextError: a source is too long.
    """
    if encoder is None:
        raise OptionError("sources are for a model with an encoder, and this one has none; give the tokens to step")
    if sources is None:
        raise OptionError("the model answers sources; make its state with new_state(sources=[token ids, ...])")
    rows = check_list("sources", sources, "lists of token ids", lambda _, row: check_tokens(row, vocab_size))
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    if not len(rows) or lengths.min() < 1:
        raise OptionError(f"sources of {shown(lengths.tolist())} tokens; give one source or more, none empty")
    if lengths.max() > encoder.max_source:
        raise ContextError(f"a source has {lengths.max()} tokens, but the model reads {encoder.max_source}; shorten it")
    padded = np.zeros((len(rows), max(int(lengths.max()), room)), dtype=np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return padded, lengths


def whole_numbers(tokens: Any) -> NDArray[Any]:
    """Tokens for a step as an array.

    Args:
        tokens: (rows, tokens) whole numbers, of any kind that is an array or a list.

    Raises:
        OptionError: they are not whole numbers of one shape.
    """
    try:
        return check_integers("tokens", tokens)
    except OptionError as error:
        raise OptionError(f"{error} of shape (rows, tokens); pad rows and give lengths") from error
