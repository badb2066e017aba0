"""Whether a model can be asked for an answer, before it is."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["check_fits"]


def check_fits(
    session: Session, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> None:
    """See that a model can be asked for an answer, before it is.

    Args:
        session: steps it.
        tokenizer: gives answers a text; None: they have none.
        prompts: token ids of each row.
        options: of all rows.

    Raises:
        ContextError: a prompt is longer than the context.
        OptionError: an option that needs a tokenizer without one, or a stop token that the model does not have.
    """
    most = session.max_context if session.encoder is None else session.encoder.max_source
    words = session.context_words if session.encoder is None else most
    for prompt in prompts:
        if len(prompt) > most:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, but the model's context holds {words}; shorten the prompt"
            )
    if options.stop and tokenizer is None:
        raise OptionError(f"stop is {options.stop!r}, but the bundle has no tokenizer; leave stop out")
    if options.echo and tokenizer is None:
        raise OptionError("echo is True, but the bundle has no tokenizer, and so no text; leave echo out")
    if options.echo and session.encoder is not None:
        raise OptionError("echo is True, but an answer to a source does not begin with it; leave echo out")
    if options.draft in ("recurrent", "combined") and session.drafter is None:
        raise OptionError(f"draft is {options.draft!r}, but the bundle has no drafter; export the model with --drafter")
    last, vocabulary = max(options.stop_tokens, default=0), session.vocab_size
    if last >= vocabulary:
        raise OptionError(f"stop_tokens has token {last}, outside the vocabulary of {vocabulary}; name its own")
