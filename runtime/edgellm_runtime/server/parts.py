"""The parts of an answer, as every interface has them: its thinking, its content and its calls, in pieces and whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.asking import Asked
from edgellm_runtime.server.call import Call
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.thinking import closing_tokens, opens_thinking
from edgellm_runtime.server.tools import Tools
from edgellm_runtime.text.answer_parts import CALL_MARKS, THINKING_MARKS, AnswerParts, answer_parts
from edgellm_runtime.text.part_stream import PartStream, Piece
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Sorted", "Sorting", "chat_prompt", "thinking_variables"]

_, _CLOSE = THINKING_MARKS
_WITHIN_CALLS = ("</tool_call>", "<|tool_call_end|>", "[ARGS]", "[CALL_ID]")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Sorted:
    """Some of an answer.

    Args:
        answer: which.
        chunk: what the model said.
        pieces: what of its parts is free to go.
        parts: all of them, with the last chunk.
        unfinished: with the last chunk, whether a call was begun that the answer did not make.
    """

    answer: int
    chunk: Chunk
    pieces: Sequence[Piece]
    parts: AnswerParts | None = None
    unfinished: bool = False


class Sorting:
    """Takes the answers to one request apart.

    Args:
        hosted: whose they are.
        tools: that were offered.
        form: whether a grammar says what an answer is, so that it has no thinking.
    """

    def __init__(self, hosted: Hosted, tools: Tools, *, form: bool) -> None:
        self._tokenizer, self._tools, self._form = hosted.model.tokenizer, tools, form

    @property
    def options(self) -> OptionKeywords:
        """What the answers must be made with: the special tokens that mark parts have a text."""
        if self._tokenizer is None:
            return {}
        marks = [*THINKING_MARKS, *((*CALL_MARKS, *_WITHIN_CALLS) if self._tools.offered else ())]
        return {"shown_tokens": [t for t in map(self._tokenizer.token_id, marks) if t is not None]}

    def parts(self, asked: Asked, answer: Generation) -> AnswerParts:
        """Those of a whole answer."""
        found = answer_parts(answer.text, tools=self._tools.names, thinking=self._thinking(asked))
        return replace(found, tool_calls=found.tool_calls[:1]) if self._tools.single else found

    def reasoning_tokens(self, asked: Asked) -> int:
        """Tokens of the thinking in all answers that are whole."""
        return sum(
            _until_closed(self._tokenizer, asked, answer)
            for answer in asked.found if self.parts(asked, answer).reasoning is not None and self._tokenizer
        )  # fmt: skip

    async def pieces(self, call: Call, asked: Asked) -> AsyncIterator[Sorted]:
        """The answers as they come."""
        streams: dict[int, PartStream] = {}
        async for index, chunk in asked.chunks():
            call.token_came()
            if index not in streams:
                streams[index] = PartStream(
                    tools=self._tools.names, thinking=self._thinking(asked), single=self._tools.single,
                    certain=self._form and bool(self._tools.required),
                )  # fmt: skip
            pieces = streams[index].push(chunk.text)
            if chunk.finish_reason is None:
                yield Sorted(index, chunk, pieces)
                continue
            rest, _ = streams[index].finish()
            parts, unfinished = self.parts(asked, asked.answer(index)), streams[index].unfinished
            yield Sorted(index, chunk, [*pieces, *rest], parts, unfinished)

    def _thinking(self, asked: Asked) -> bool:
        return not self._form and self._tokenizer is not None and opens_thinking(self._tokenizer, asked.prompt)


def _until_closed(tokenizer: Tokenizer, asked: Asked, answer: Generation) -> int:
    stream, end = tokenizer.stream(after=asked.prompt, skip_special=False), ""
    for count, token in enumerate(answer.tokens, 1):
        end = (end + stream.push(token))[-256:]
        if _CLOSE in end:
            return count
    return len(answer.tokens)


def chat_prompt(
    hosted: Hosted, messages: Sequence[dict[str, Any]], tools: Tools, variables: dict[str, Any] | None, *, form: bool
) -> list[int]:
    """A chat's prompt. Where a grammar says what the answer is, thinking that the template has opened is closed again.

    Args:
        hosted: who is asked.
        messages: as templates have them.
        tools: that are offered.
        variables: the template's own.
        form: whether there is a grammar.

    Raises:
        RuntimeFault: the template refuses them, or fails.
    """
    tools.check_template(hosted)
    template, tokenizer = hosted.model.chat_template, hosted.model.tokenizer
    prompt = template.encode(messages, tools=list(tools.offered) or None, template_variables=variables)
    if form and tokenizer is not None and opens_thinking(tokenizer, prompt):
        prompt = [*prompt, *closing_tokens(tokenizer)]
    return prompt


def thinking_variables(fields: Fields, name: str, effort: Any, hosted: Hosted) -> dict[str, Any]:
    """What a template is told of how much to think, by the names that templates have for it.

    Args:
        fields: that have the wish.
        name: of the field.
        effort: a word; None: nothing is said, and the template does as it does.
        hosted: whose template it is.

    Raises:
        ApiError: another word, or a template that cannot be told.
    """
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise fields.wrong(name, effort, f"one of {', '.join(_EFFORTS)}")
    said = {"enable_thinking": effort != "none", "thinking": effort != "none", "reasoning_effort": effort}
    if found := {k: v for k, v in said.items() if k in hosted.model.chat_template.variables}:
        return found
    raise fields.unsupported(name, "by this model, whose chat template cannot be told how much to think")
