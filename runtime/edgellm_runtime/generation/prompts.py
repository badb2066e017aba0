"""What a caller gives as a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import is_sequence, shown
from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer, check_tokens

__all__ = ["Tokens", "is_batch", "prompt_tokens"]

Tokens = Sequence[int] | NDArray[np.integer[Any]]


def prompt_tokens(
    prompt: Any, session: Session, tokenizer: Tokenizer | None, *, name: str = "the prompt", before: Sequence[int] = (),
    cut: bool = False,
) -> list[int]:  # fmt: skip
    """The tokens of a prompt, with those that it goes on from.

    Args:
        prompt: a text or token ids; may be empty where something comes before it or the model has a begin token.
        session: of the model.
        tokenizer: of the model, or None.
        name: of the prompt, for errors.
        before: tokens that it goes on from.
        cut: whether of one that is longer than the context its beginning is taken.

    Raises:
        OptionError: neither a text nor token ids, tokens outside the vocabulary, or nothing to begin with.
        ContextError: more tokens than the context holds.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise OptionError(f"{name} is a text, but the bundle has no tokenizer; pass token ids")
        tokens = tokenizer.encode(prompt, bos=tokenizer.add_bos and not before) + tokenizer.source_end
    elif is_sequence(prompt):
        try:
            tokens = check_tokens(prompt, session.vocab_size)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error
    else:
        raise OptionError(f"{name} is {shown(prompt)}; it must be a text or a list of token ids")
    tokens = [*before, *tokens][: session.max_context if cut else None]
    if session.encoder is None and len(tokens) > session.max_context:  # whoever reads sources looks at these
        name = f"{name}, with the text before it," if before else name
        raise ContextError(
            f"{name} has {len(tokens)} tokens, but the model's context holds {session.context_words}; shorten the "
            "prompt"
        )
    if tokens:
        return tokens
    if tokenizer is None or tokenizer.bos_token_id is None:
        raise OptionError(f"{name} is empty and the model has no bos token to start from; pass some text")
    return [tokenizer.bos_token_id]


def is_batch(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts: one of none, of texts, or of lists; an array of numbers is one prompt."""
    if not is_sequence(prompt):
        return False
    if not len(prompt):
        return not hasattr(prompt, "dtype")
    return isinstance(prompt[0], str) or is_sequence(prompt[0])
