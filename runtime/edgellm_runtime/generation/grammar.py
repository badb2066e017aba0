"""Answers that have a form: JSON of a schema, a regular expression, a grammar, or one of some texts.

Before each token, those that could not go on with an answer of the form are forbidden, so that what comes out is of it
by construction. Which tokens these are is the work of llguidance (extra ``grammar``); here it is told what a row holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgellm_runtime.arguments import check_list, check_text, shown
from edgellm_runtime.errors import OptionError, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellm_runtime.generation.processors import LogitsProcessor

__all__ = ["Grammar", "GrammarUse", "Vocabulary", "grammar_of"]

_MOST = 1 << 20  # characters of a grammar
_JSON = {"whitespace_pattern": "[ ]?"}  # a space where models write one; any number lets small ones write nothing else


@dataclass
class GrammarUse:
    """What forms have cost since they were made.

    Args:
        tokens: that were chosen under one.
        seconds: spent on which tokens are possible.
    """

    tokens: int = 0
    seconds: float = 0.0


class Vocabulary:
    """What llguidance knows of a tokenizer; made once a model, in half a second for 50,000 tokens.

    Args:
        tokenizer_json: the text of the file.
        vocab_size: length of a row of logits.
        ends: the tokens that end an answer.

    Raises:
        OptionError: the library is missing or cannot read it, or there is no token to end an answer with.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, ends: Sequence[int]) -> None:
        library = _library()
        if not ends:
            raise OptionError(
                "the bundle has no end token, with which an answer of a form ends; use stop texts instead"
            )
        try:
            self.library = library.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(ends))
        except Exception as error:  # the library has no class of its own for it
            raise OptionError(
                f"this tokenizer has no grammars ({first_line(error)}); use stop texts instead"
            ) from error
        self.size = vocab_size


@dataclass(frozen=True)
class Grammar:
    """A form for one model's answers, any number of them; :meth:`edgellm_runtime.Model.grammar` makes it.

    Args:
        source: in llguidance's own language.
        vocabulary: of the model.
        use: counts what it costs.
    """

    source: str = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    use: GrammarUse = field(default_factory=GrammarUse, compare=False)

    def matcher(self, answer_from: int) -> LogitsProcessor:
        """What forbids a row's tokens.

        Args:
            answer_from: how many tokens come before the row's answer.
        """
        return _Matcher(self, answer_from)


def grammar_of(
    vocabulary: Vocabulary, *, json_schema: Mapping[str, Any] | str | None = None, regex: str | None = None,
    lark: str | None = None, choices: Sequence[str] | None = None,
) -> Grammar:  # fmt: skip
    """A form, from exactly one description of it.

    Args:
        vocabulary: of the model.
        json_schema: answers are JSON that it holds for; a dict or its text. ``{}`` is any JSON.
        regex: answers match it, whole; in the syntax of Rust's regular expressions.
        lark: answers are of this grammar, in llguidance's variant of Lark's language; it begins at ``start``.
        choices: answers are one of these texts.

    Raises:
        OptionError: none or several are given, or what is given is no such thing.
    """
    given = {"json_schema": json_schema, "regex": regex, "lark": lark, "choices": choices}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise OptionError(f"a grammar needs one of {', '.join(given)}, and has {', '.join(named) or 'none'}; give one")
    matcher = _library().LLMatcher
    (name,) = named
    if json_schema is not None:
        source = _from_schema(matcher, json_schema)
    elif regex is not None:
        source = matcher.grammar_from_regex(check_text("regex", regex))
    else:
        text = _one_of(choices) if choices is not None else check_text("lark", lark)
        source = matcher.grammar_from_lark(text)
    if len(source) > _MOST:
        raise OptionError(f"{name} makes a grammar of {len(source):,} characters, of at most {_MOST:,}; simplify it")
    if wrong := matcher.validate_grammar(source, vocabulary.library):
        raise OptionError(f"{name} cannot be used ({_in_one_line(wrong)}); correct it")
    return Grammar(source, vocabulary)


def _from_schema(matcher: Any, schema: Any) -> str:
    if not isinstance(schema, (str, Mapping)):
        raise OptionError(f"json_schema is {shown(schema)}; it must be a dict, or its JSON")
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        source: str = matcher.grammar_from_json_schema(text, overrides=_JSON)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"json_schema cannot be used ({_in_one_line(str(error))}); correct it") from error
    return source


def _one_of(choices: Any) -> str:
    texts = check_list("choices", choices, "texts", lambda name, value: check_text(name, value))
    if not texts or not all(texts):
        raise OptionError(f"choices is {shown(choices)}; it must be at least one text, and none of them empty")
    return "start: " + " | ".join(json.dumps(text, allow_nan=False) for text in texts)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise OptionError("answers of a form need llguidance; pip install 'llguidance>=1.7,<2'") from error
    return llguidance


class _Matcher:
    """Follows one row's answer; what it was shown before may be taken back again, as a guess that was wrong is."""

    def __init__(self, grammar: Grammar, answer_from: int) -> None:
        import numpy as np

        self._grammar, self._start = grammar, answer_from
        self._matcher = _library().LLMatcher(grammar.vocabulary.library, grammar.source)
        self._held: list[int] = []
        self._mask = np.zeros((grammar.vocabulary.size + 31) // 32, dtype=np.int32)

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`~edgellm_runtime.generation.processors.LogitsProcessor`."""
        import numpy as np

        start = time.perf_counter()
        self._follow(tokens[self._start :].tolist())
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise OptionError(f"the grammar cannot go on ({_in_one_line(self._matcher.get_error())}); simplify it")
        possible = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=len(logits))
        logits[possible == 0] = -np.inf
        self._grammar.use.tokens += 1
        self._grammar.use.seconds += time.perf_counter() - start

    def _follow(self, tokens: list[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(self._held, tokens, strict=False)) if a != b), None)
        kept = min(len(self._held), len(tokens)) if same is None else same
        if kept < len(self._held):
            self._matcher.rollback(len(self._held) - kept)
        if kept < len(tokens) and not self._matcher.consume_tokens(tokens[kept:]):
            raise OptionError(
                f"the answer so far is not of the grammar ({_in_one_line(self._matcher.get_error())}); begin it anew"
            )
        self._held = tokens
