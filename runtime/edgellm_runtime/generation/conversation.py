"""A conversation that reads only what is new: the state stays between turns.

Each turn renders the whole conversation and compares it, token by token, with what the state holds. What agrees is not
read again; where they part, the state is rewound to that point, or to the last snapshot before it. The state has
therefore always read exactly the rendered tokens. Kernels may round a token that was read alone otherwise than one in a
prompt (quantized ones do), so where two tokens are nearly tied, a fresh reading may choose the other.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict, Unpack

from edgellm_runtime.arguments import check_integer, check_path, check_text, is_sequence, shown
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import OptionError, StateError
from edgellm_runtime.generation.beam_run import run_of
from edgellm_runtime.generation.generate import Chunk, Generation, GenerationOptions, OptionKeywords
from edgellm_runtime.generation.options import with_defaults
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.row_options import RowOptions
from edgellm_runtime.generation.text_state import about_of, load_for, trail_of
from edgellm_runtime.generation.trail import Trail
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.text.chat import ChatTemplate, Objects
from edgellm_runtime.text.messages import Message, check_inputs, check_messages
from edgellm_runtime.text.tokenizer import Tokenizer, check_tokens

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
        bundle: the session's, for what is saved.
        prefixes: what texts began with before; None: nothing is kept.

    Raises:
        OptionError: what no template can be given.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, template: ChatTemplate, system: str | None,
        inputs: TemplateInputs, defaults: Mapping[str, Any], bundle: Bundle, prefixes: Prefixes | None = None,
    ) -> None:  # fmt: skip
        self._session, self._tokenizer, self._template, self._bundle = session, tokenizer, template, bundle
        check_inputs(inputs.get("tools"), inputs.get("documents"), inputs.get("template_variables"))
        self._inputs, self._defaults, self._prefixes = inputs, defaults, prefixes
        self._state: State | None = None
        self._trail = Trail(session.signature.state)
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
        self._forget()
        self.last, self.reused_tokens = None, 0

    def _forget(self) -> None:
        self._state, self._trail, self._held = None, Trail(self._session.signature.state), []

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
        """How much memory the state takes, its snapshots included."""
        return self._trail.nbytes + (self._state.nbytes if self._state is not None else 0)

    def fork(self) -> Conversation:
        """A copy that goes its own way, with a state of its own; an open stream is closed first."""
        self._close()
        made = Conversation(
            self._session, self._tokenizer, self._template, self.system, self._inputs, self._defaults, self._bundle,
            self._prefixes,
        )  # fmt: skip
        made._messages, made.last = self.messages, self.last
        made._state = None if self._state is None else self._state.fork()
        made._trail, made._held = self._trail.copy(), list(self._held)
        return made

    @property
    def adapter(self) -> str | None:
        """The adapter that answers; None: the model without one."""
        return self._session.adapter

    def switch(self, adapter: str | None) -> None:
        """Answer with another adapter from the next turn on, which reads the whole history with it.

        What was said stays; what the adapter before has read of it is forgotten. An open stream is closed.

        Args:
            adapter: the name of one of the bundle's; None for none.

        Raises:
            OptionError: there is none of that name.
        """
        session = self._session.with_adapter(adapter)
        self._close()
        if session.adapter != self._session.adapter:
            self._session, self._prefixes = session, None if self._prefixes is None else self._prefixes.of(session)
            self._forget()

    def rewind(self, turns: int = 1) -> None:
        """Take the last turns back, an open stream's among them; the next one reads only what differs.

        Args:
            turns: how many of the user's messages go, with all that follows them.

        Raises:
            OptionError: more turns than there are.
        """
        self._close()
        asked = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if turns := check_integer("turns", turns, 0, len(asked)):
            del self._messages[asked[-turns] :]

    def edit(self, messages: Sequence[Message]) -> None:
        """Put another history in the place of this one; the next turn reads only from where they part.

        Args:
            messages: from the first, a system message too if there is to be one; each a text by a role.

        Raises:
            OptionError: malformed messages.
        """
        checked = [] if is_sequence(messages) and not len(messages) else check_messages(messages)
        if wrong := next((m for m in checked if not isinstance(m.get("content"), str)), None):
            raise OptionError(f"a conversation's message is {shown(wrong)}; its content must be a text")
        self._close()
        self._messages = [{"role": m["role"], "content": m["content"]} for m in checked]
        first = self._messages[:1]
        self.system = first[0]["content"] if first and first[0]["role"] == "system" else None

    def save(self, path: str | Path) -> None:
        """Write the messages and the state to a file that ``Model.load_conversation`` reads; an open stream is closed.

        Raises:
            OptionError: tools or variables of the template that JSON has not.
            StateError: the file cannot be written.
        """
        self._close()
        state = self._session.new_state() if self._state is None else self._state
        about = about_of(self._bundle) | {"held": self._held, "messages": self._messages, "inputs": self._inputs}
        state.save(check_path("path", path), about=about, snapshots=self._trail.snapshots())

    def restore(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, in the place of what is here; ``Model.load_conversation`` calls it.

        Raises:
            StateError: no such file, a damaged one, or one of another model or of another version of it.
        """
        path = check_path("path", path)
        state = load_for(path, self._session, self._bundle)
        try:
            held = check_tokens(_listed(state.about["held"]), self._session.vocab_size)
            if state.batch != 1 or state.lengths.tolist() != [len(held)]:
                raise OptionError(f"{len(held)} tokens, but rows of {state.lengths.tolist()}")
            inputs = _inputs_of(state.about["inputs"])
            self.edit(_listed(state.about["messages"]))
        except (KeyError, OptionError) as error:
            raise StateError(f"{path}: its conversation is damaged ({error}); begin another") from error
        self._inputs = inputs
        self._state, self._trail, self._held = state, trail_of(state), held
        self.last, self.reused_tokens = None, 0

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
        if checked.adapter not in (None, self._session.adapter):
            raise OptionError(
                f"adapter is {checked.adapter!r}, and the conversation has read with another or none; switch it with "
                "conversation.switch(name)"
            )
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
        run = run_of(
            self._session, self._tokenizer, [prompt], RowOptions(options), state=state, trail=self._trail,
            prefixes=self._prefixes,
        )  # fmt: skip
        said: list[str] = []
        tokens = list(prompt)
        clean = False
        try:
            with closing(run.chunks()) as chunks:
                for _, chunk in chunks:
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
                self._forget()
            if said:
                self._messages = [*turn, {"role": "assistant", "content": "".join(said)}]

    def _resume(self, prompt: list[int], options: GenerationOptions) -> State:
        """A state that holds a proper prefix of the prompt, as long as can be."""
        pairs = zip(self._held, prompt[:-1], strict=False)  # the last token must be read, for its logits
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._held), len(prompt) - 1))
        needed = min(len(prompt) + options.max_new_tokens, self._session.max_context)
        if self._state is None:
            self._state = self._session.new_state(1, needed)
        self.reused_tokens = self._trail.rewind(self._state, common)
        self._state.reserve(needed)
        self._held = self._held[: self.reused_tokens]
        return self._state


def _listed(value: Any) -> list[Any]:
    """Of a file, a list that is one."""
    if type(value) is not list:
        raise OptionError(f"{shown(value)} is no list")
    return value


def _inputs_of(value: Any) -> TemplateInputs:
    """Of a file, what a template is given."""
    if type(value) is not dict or not value.keys() <= TemplateInputs.__annotations__.keys():
        raise OptionError(f"{shown(value)} are no inputs of a template")
    found = TemplateInputs(
        tools=value.get("tools"), documents=value.get("documents"), template_variables=value.get("template_variables")
    )
    check_inputs(found["tools"], found["documents"], found["template_variables"])
    return found
