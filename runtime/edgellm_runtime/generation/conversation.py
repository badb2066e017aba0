"""A conversation that reads only what is new: the state stays between turns.

Each turn renders the whole conversation and compares it, token by token, with what the state holds. What agrees is not
read again; where they part, the state is rewound to that point, or, if it cannot be, begun anew. The state has
therefore always read exactly the rendered tokens. Kernels may round a token that was read alone otherwise than one in a
prompt (quantized ones do), so where two tokens are nearly tied, a fresh reading may choose the other.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Mapping
from typing import Any, TypedDict, Unpack

from edgellm_runtime.arguments import check_text
from edgellm_runtime.errors import StateError
from edgellm_runtime.generation.generate import Chunk, Generation, GenerationOptions, OptionKeywords, Run
from edgellm_runtime.generation.options import with_defaults
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.text.chat import ChatTemplate, Objects
from edgellm_runtime.text.messages import check_inputs
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Conversation", "TemplateInputs"]


class TemplateInputs(TypedDict, total=False):
    """What a chat template is given besides messages; see :meth:`ChatTemplate.render`."""

    tools: Objects | None
    documents: Objects | None
    template_variables: Mapping[str, Any] | None


class Conversation:
    """Turns between a user and the model. Made by ``Model.conversation``.

    A stream that is left before its end, or that another turn closes, leaves its turn in the conversation with what was
    said until then; a turn of which nothing was said leaves nothing.

    Args:
        session: steps the model.
        tokenizer: the bundle's.
        template: renders the messages.
        system: the system message, or None.
        inputs: what else the template is given in every turn.
        defaults: the options of turns that name no other.

    Raises:
        OptionError: what no template can be given.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, template: ChatTemplate, system: str | None,
        inputs: TemplateInputs, defaults: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._session, self._tokenizer, self._template = session, tokenizer, template
        check_inputs(inputs.get("tools"), inputs.get("documents"), inputs.get("template_variables"))
        self._inputs, self._defaults = inputs, defaults
        self._state: State | None = None
        self._held: list[int] = []  # the tokens that the state has read
        self._messages: list[dict[str, str]] = []
        # the only stream that may write; weakly, so that one that its reader drops ends there and then
        self._open: weakref.ref[Generator[Chunk, None, None]] | None = None
        self.system = None if system is None else check_text("system", system)
        self.last: Generation | None = None
        self.reused_tokens = 0
        self.reset()

    def __repr__(self) -> str:
        turns = sum(message["role"] == "user" for message in self._messages)
        return f"<Conversation: {turns} turns, {self.held_tokens} tokens held, {self.state_bytes} bytes>"

    def reset(self, *, system: str | None = None) -> None:
        """Forget every turn, an open stream's too.

        Args:
            system: a new system message; None keeps the one there is.
        """
        if system is not None:
            check_text("system", system)
        self._close()
        self.system = self.system if system is None else system
        self._messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self._state, self._held = None, []
        self.last, self.reused_tokens = None, 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said so far, as ``{"role": ..., "content": ...}``; an open stream's turn is not among it yet."""
        return [dict(message) for message in self._messages]

    @property
    def held_tokens(self) -> int:
        """How many tokens the state holds."""
        return len(self._held)

    @property
    def state_bytes(self) -> int:
        """How much memory the state takes."""
        return self._state.nbytes if self._state is not None else 0

    def say(self, text: str, **options: Unpack[OptionKeywords]) -> Generation:
        """The model's answer to a user's message.

        Args:
            text: the message.
            **options: those of :class:`GenerationOptions`.

        Raises:
            ContextError: the conversation no longer fits into the context; the message is not kept.
        """
        for _ in self.stream(text, **options):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str, **options: Unpack[OptionKeywords]) -> Generator[Chunk, None, None]:
        """The same, chunk by chunk; what was said before the stream is left is kept as the answer.

        A stream of this conversation that is still open is closed, and goes on no more.

        Args:
            text: the message.
            **options: those of :class:`GenerationOptions`.

        Raises:
            ContextError: the conversation no longer fits into the context; the message is not kept.
            StateError: called from within a step of the open stream.
        """
        check_text("text", text)
        checked = with_defaults(self._defaults, options)
        self._close()
        turn = [*self._messages, {"role": "user", "content": text}]
        prompt = self._template.encode(turn, **self._inputs)
        stream = self._answer(turn, prompt, checked)
        self._open = weakref.ref(stream)
        return stream

    def _close(self) -> None:
        """End the open stream, which writes down its turn; what is closed never runs again."""
        stream = self._open() if self._open is not None else None
        if stream is not None and inspect.getgeneratorstate(stream) == inspect.GEN_RUNNING:
            raise StateError("the conversation is within a step of an answer; begin another turn after it")
        if stream is not None:
            stream.close()
        self._open = None

    def _answer(
        self, turn: list[dict[str, str]], prompt: list[int], options: GenerationOptions
    ) -> Generator[Chunk, None, None]:
        state = self._resume(prompt, options)
        run = Run(self._session, self._tokenizer, [prompt], options, state=state)
        said: list[str] = []
        tokens = list(prompt)
        clean = False
        try:
            for _, chunk in run.chunks():
                said.append(chunk.text)
                tokens += chunk.token_ids
                yield chunk
            self.last = run.result()
            clean = True
        except GeneratorExit:  # the reader left between two steps
            clean = True
            raise
        finally:
            if clean:
                self._state, self._held = state, tokens[: int(state.lengths[0])]
            else:  # an error or an interrupt within a step: nobody knows what the state has read
                self._state, self._held = None, []
            if said:
                self._messages = [*turn, {"role": "assistant", "content": "".join(said)}]

    def _resume(self, prompt: list[int], options: GenerationOptions) -> State:
        """A state that holds a proper prefix of the prompt, as long as can be."""
        pairs = zip(self._held, prompt[:-1], strict=False)  # the last token must be read, for its logits
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(prompt) - 1))
        needed = min(len(prompt) + options.max_new_tokens, self._session.max_context)
        if self._state is not None:
            try:
                self._state.rewind(common)
                self._state.reserve(needed)
                self._held, self.reused_tokens = self._held[:common], common
                return self._state
            except StateError:  # a recurrence, or a ring that no longer holds that point
                pass
        self._state, self._held, self.reused_tokens = None, [], 0
        return self._session.new_state(1, needed)
