"""How an answer is chosen and when it ends: every option of the generating methods, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edgellm_runtime.arguments import check_flag, check_integer, check_list, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.generation.sampling import SamplingOptions

__all__ = ["GenerationOptions", "OptionKeywords"]


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
    seed: int | Sequence[int] | None
    logits_processors: Sequence[LogitsProcessor]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How an answer is chosen and when it ends.

    Args:
        max_new_tokens: at most so many tokens; fewer when the context is full. 0 asks the model nothing.
        stop: texts that end the answer and are no part of it; a single string is one of them.
        ignore_eos: go on past end tokens, for measuring.

    Raises:
        OptionError: a value is outside its range.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        checked = {
            "max_new_tokens": check_integer("max_new_tokens", self.max_new_tokens, 0),
            "stop": tuple(check_list("stop", stops, "texts", _check_stop)),
            "ignore_eos": check_flag("ignore_eos", self.ignore_eos),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _check_stop(_: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"stop holds {shown(value)}; each stop must be a text of at least one character")
    return value
