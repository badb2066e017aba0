"""How an answer is chosen and when it ends: every option of the generating methods, checked."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edgellm_runtime.arguments import (
    check_flag,
    check_instance,
    check_integer,
    check_list,
    check_number,
    check_progress,
    check_text,
    shown,
)
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.drafting import Drafting
from edgellm_runtime.generation.grammar import Grammar
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.generation.sampling_options import SamplingOptions
from edgellm_runtime.option_ranges import RANGES, check_token

__all__ = ["GenerationOptions", "OptionKeywords", "with_defaults"]

_DRAWING = ("temperature", "top_k", "top_p", "min_p")  # defaults that are not beams'


class OptionKeywords(TypedDict, total=False):
    """The keywords that every generating method takes: :class:`GenerationOptions`' fields, none required."""

    max_new_tokens: int
    stop: str | Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram: int
    logit_bias: Mapping[int, float] | None
    banned_tokens: Sequence[int]
    min_tokens: int
    stop_tokens: Sequence[int]
    logprobs: int | None
    skip_special_tokens: bool
    shown_tokens: Sequence[int]
    echo: bool
    progress: Callable[[int, int], None] | None
    draft: Drafting | None
    beams: int
    length_penalty: float
    adapter: str | None
    deadline: float | None
    cancel: threading.Event | None
    typical_p: float
    penalty_window: int
    forced_tokens: Sequence[int]
    grammar: Grammar | None
    seed: int | Sequence[int] | None
    logits_processors: Sequence[LogitsProcessor]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How an answer is chosen and when it ends.

    Args:
        max_new_tokens: at most so many tokens; fewer when the context is full. 0 asks the model nothing.
        stop: texts that end the answer and are no part of it; a single string is one of them.
        ignore_eos: go on past end tokens, for measuring.
        stop_tokens: end the answer too, as the stop texts do, and are no part of its text.
        logprobs: so many of the most probable tokens are given for each token of the answer with their
            log-probabilities, beside the token's own; None: none of it. The logits then always come to the CPU.
        skip_special_tokens: whether special tokens, the end token among them, have no text.
        shown_tokens: special tokens that have their names as a text all the same, such as those around thinking.
        echo: the answer's text begins with the prompt's.
        progress: is told, between two pieces of a long prompt, how many of how many tokens have been read. What it
            raises ends the call and comes through.
        draft: proposes tokens that the model then checks, several in one step: ``"lookup"``, what followed the same
            words before; ``"recurrent"``, the bundle's own drafter; ``"combined"``, the first where there is such,
            else the second; or a smaller model of the same vocabulary. The tokens stay what they are; where drafts do
            not pay, none are made. For one answer to one prompt; others go without.
        beams: follow so many likeliest beginnings of an answer, and give the likeliest whole one; 1 is greedy or draws.
            The answer is there all at once, in a stream as one chunk. ``n`` answers are then the ``n`` best.
        length_penalty: of beams: 0 compares log-probabilities, 1 their means over an answer's tokens.
        adapter: of those that the bundle has, the one to answer with; None: that of the model or of the conversation,
            which has none unless ``with_adapter`` gave it one.
        deadline: seconds after the call at which the answer ends, between two tokens or two pieces of a long prompt;
            ``finish_reason`` is then ``deadline``. What it has by then is the answer.
        cancel: ends the answer at the same points once it is set, by whichever thread.

    Raises:
        OptionError: a value is outside its range.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    stop_tokens: Sequence[int] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_tokens: Sequence[int] = ()
    echo: bool = False
    progress: Callable[[int, int], None] | None = None
    draft: Drafting | None = None
    beams: int = 1
    length_penalty: float = 1.0
    adapter: str | None = None
    deadline: float | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checked = {
            **{name: RANGES[name](name, getattr(self, name)) for name in ("max_new_tokens", "stop")},
            "ignore_eos": check_flag("ignore_eos", self.ignore_eos),
            "stop_tokens": tuple(check_list("stop_tokens", self.stop_tokens, "token ids", check_token)),
            "logprobs": None if self.logprobs is None else check_integer("logprobs", self.logprobs, 0, 2**20),
            "skip_special_tokens": check_flag("skip_special_tokens", self.skip_special_tokens),
            "shown_tokens": tuple(check_list("shown_tokens", self.shown_tokens, "token ids", check_token)),
            "echo": check_flag("echo", self.echo),
            "beams": check_integer("beams", self.beams, 1, 1024),
            "length_penalty": check_number("length_penalty", self.length_penalty, -10, 10),
            "deadline": None if self.deadline is None else check_number("deadline", self.deadline, 0, 1e9),
        }
        check_integer("min_tokens", self.min_tokens, 0, self.max_new_tokens)
        if self.grammar is not None and self.ignore_eos:
            raise OptionError("an answer of a grammar ends with an end token; leave ignore_eos out")
        drafts = (
            self.draft in ("lookup", "recurrent", "combined")
            if isinstance(self.draft, str)
            else callable(getattr(self.draft, "drafter", None))
        )
        if self.draft is not None and not drafts:
            raise OptionError(
                f"draft is {shown(self.draft)}; it must be 'lookup', 'recurrent', 'combined', a Model, or None"
            )
        if self.beams > 1 and (self.temperature > 0 or self.draft is not None):
            raise OptionError(
                f"beams is {self.beams}, and beams neither draw nor take drafts; set temperature to 0 and leave draft "
                "out, or leave beams out"
            )
        if self.cancel is not None:
            check_instance("cancel", self.cancel, threading.Event, "threading.Event() makes one")
        if self.adapter is not None:
            check_text("adapter", self.adapter)
        check_progress(self.progress)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def with_defaults(defaults: Mapping[str, Any], options: OptionKeywords) -> GenerationOptions:
    """A caller's options, and a model's own for those that the caller does not name.

    Args:
        defaults: checked by :func:`edgellm_runtime.option_ranges.check_defaults`.
        options: the caller's keywords.

    Raises:
        OptionError: one of the caller's is no option, or outside its range.
    """
    known = GenerationOptions.__dataclass_fields__
    if unknown := next((name for name in options if name not in known), None):
        near = difflib.get_close_matches(unknown, known, 1)
        raise OptionError(
            f"there is no option {unknown!r}; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}")
        )
    beams = options.get("beams", 1)
    own = {k: v for k, v in defaults.items() if k not in _DRAWING} if type(beams) is int and beams > 1 else defaults
    both: dict[str, Any] = {**own, **options}
    most = both.get("max_new_tokens", GenerationOptions.max_new_tokens)
    if "min_tokens" in defaults and "min_tokens" not in options and type(most) is int:
        both["min_tokens"] = min(defaults["min_tokens"], max(most, 0))  # a shorter answer is what was asked for
    return GenerationOptions(**both)
