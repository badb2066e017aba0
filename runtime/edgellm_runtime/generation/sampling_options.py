"""How the next token is chosen, in options, each checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm_runtime.arguments import check_instance, check_integer, check_list, check_number, is_sequence, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.grammar import Grammar
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.option_ranges import RANGES, check_token

__all__ = ["SamplingOptions"]

_RANGED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram", "banned_tokens", "min_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most probable token (lowest id on a tie).
        top_k: keep the k most probable tokens; 0 keeps all. Fan et al. 2018, arXiv:1805.04833.
        top_p: keep the fewest tokens whose probabilities sum to at least p. Holtzman et al. 2019, arXiv:1904.09751.
        min_p: keep tokens at least this fraction as probable as the most probable. Nguyen et al. 2024,
            arXiv:2407.01082.
        typical_p: keep the tokens whose surprise is nearest to the distribution's entropy, the fewest whose
            probabilities sum to at least p. Meister et al. 2022, arXiv:2202.00666.
        repetition_penalty: divides positive and multiplies negative logits of every token that the row already holds,
            prompt included; 1 does nothing. Keskar et al. 2019, arXiv:1909.05858.
        presence_penalty: is taken from the logits of every token that the answer already holds.
        frequency_penalty: likewise, for each time that it holds it.
        penalty_window: the three penalties look at so many of a row's last tokens; 0: at all of them.
        no_repeat_ngram: no run of so many tokens comes twice in a row, prompt included; 0 lets all come.
        logit_bias: token id to what is added to its logit.
        banned_tokens: are never chosen.
        forced_tokens: the answer begins with these.
        min_tokens: end tokens and stop tokens are not chosen before so many.
        grammar: a form that the answer has; see :meth:`edgellm_runtime.Model.grammar`. It ends with an end token where
            the form is complete; an answer that ``max_new_tokens`` or a full context ends is the beginning of one.
        seed: makes draws repeatable; a list has one for each row. None is fresh entropy.
        logits_processors: change the model's own logits, in this order, before all of the above; see
            :class:`~edgellm_runtime.generation.processors.LogitsProcessor`.

    Raises:
        OptionError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] | None = None
    banned_tokens: Sequence[int] = ()
    forced_tokens: Sequence[int] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None
    seed: int | Sequence[int] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        checked = {
            **{name: RANGES[name](name, getattr(self, name)) for name in _RANGED},
            "typical_p": check_number("typical_p", self.typical_p, 0, 1, open_low=True),
            "presence_penalty": check_number("presence_penalty", self.presence_penalty, -1000, 1000),
            "frequency_penalty": check_number("frequency_penalty", self.frequency_penalty, -1000, 1000),
            "penalty_window": check_integer("penalty_window", self.penalty_window, 0),
            "logit_bias": _check_bias(self.logit_bias),
            "forced_tokens": tuple(check_list("forced_tokens", self.forced_tokens, "token ids", check_token)),
            "seed": _check_seed(self.seed),
            "logits_processors": tuple(
                check_list("logits_processors", self.logits_processors, "functions", _check_function)
            ),
        }
        if self.grammar is not None:
            check_instance("grammar", self.grammar, Grammar, "model.grammar(...) makes one")
            if self.forced_tokens or self.min_tokens:
                raise OptionError(
                    "a grammar says how an answer begins and ends; leave forced_tokens and min_tokens out"
                )
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _check_bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias is {shown(bias)}; it must be a dict of token ids to numbers")
    return {
        check_token("a token of logit_bias", token): check_number(f"logit_bias[{shown(token)}]", value, -1e6, 1e6)
        for token, value in bias.items()
    }


def _check_seed(seed: object) -> int | tuple[int, ...] | None:
    if is_sequence(seed):
        return tuple(check_list("seed", seed, "integers", lambda name, value: check_integer(name, value, 0)))
    return None if seed is None else check_integer("seed", seed, 0)


def _check_function(name: str, value: object) -> LogitsProcessor:
    if not callable(value):
        raise OptionError(f"{name} is {shown(value)}; it must be a function of a row's tokens and logits")
    return value
