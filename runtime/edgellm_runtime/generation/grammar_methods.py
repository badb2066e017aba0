"""A model's method that makes forms for its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.grammar import Grammar, Vocabulary, grammar_of
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["GrammarMethods"]


class GrammarMethods:
    """What a model has of them; it has a session and a tokenizer."""

    session: Session

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to token ids and back; None for a bundle without a tokenizer."""
        raise NotImplementedError

    def grammar(
        self, *, json_schema: Mapping[str, Any] | str | None = None, regex: str | None = None, lark: str | None = None,
        choices: Sequence[str] | None = None,
    ) -> Grammar:  # fmt: skip
        """A form for answers, to be given as the option ``grammar``, to as many calls as one likes.

        Needs llguidance (extra ``grammar``). The first one takes half a second for a vocabulary of 50,000.

        Args:
            json_schema: answers are JSON that it holds for; a dict or its text. ``{}`` is any JSON.
            regex: answers match it, whole; in the syntax of Rust's regular expressions.
            lark: answers are of this grammar, in llguidance's variant of Lark's language; it begins at ``start``.
            choices: answers are one of these texts.

        Raises:
            OptionError: not exactly one of them is given, it is no such thing, the library is missing, or the model has
                no tokenizer or no end token.
        """
        return grammar_of(self._vocabulary, json_schema=json_schema, regex=regex, lark=lark, choices=choices)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        if self.tokenizer is None:
            raise OptionError("the bundle has no tokenizer, and so no text that could have a form; leave grammar out")
        return Vocabulary(self.tokenizer.to_json(), self.session.vocab_size, sorted(self.tokenizer.eos_token_ids))
