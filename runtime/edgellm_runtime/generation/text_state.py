"""A text that a model has read, with the state that this left: a value to keep, copy, rewind, save and go on from.

A :class:`~edgellm_runtime.state.State` is tensors; this is one row of them and the tokens that made it. The last token
of a text is never read: its logits are those of the next token, which whoever goes on needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from edgellm_runtime.arguments import check_instance, check_integer, check_path, shown
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import OptionError, StateError
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.trail import Trail, read_text
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import check_tokens

__all__ = ["TextState", "about_of", "load_for", "trail_of"]


class TextState:
    """What a model holds of one text. ``Model.new_state`` makes an empty one, and answers that were given one have one.

    Generating from it leaves it as it is; the answer's ``state`` is another, which has the answer too.

    Args:
        session: stepped what is here.
        bundle: the session's, for what is saved.
        tokens: of the text.
        state: of one row, which has read a proper prefix of them; None: nothing was read.
        answer_from: how many tokens come before the last answer.
        trail: snapshots of the state on its way; None: none so far.
    """

    def __init__(
        self, session: Session, bundle: Bundle, tokens: Sequence[int] = (), state: State | None = None,
        answer_from: int | None = None, trail: Trail | None = None,
    ) -> None:  # fmt: skip
        self._session, self._bundle, self._state = session, bundle, state
        self._tokens = list(tokens)
        self.answer_from = len(self._tokens) if answer_from is None else answer_from
        self._trail = Trail(session.signature.state) if trail is None else trail

    def __repr__(self) -> str:
        return f"<TextState of {self._bundle.manifest.name}: {len(self)} tokens, {self.nbytes} bytes>"

    def __len__(self) -> int:
        """How many tokens the text has."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The text's tokens: prompts and answers, end tokens and stop texts' included."""
        return tuple(self._tokens)

    @property
    def read_tokens(self) -> int:
        """How many of the tokens, from the first, need not be read again."""
        return 0 if self._state is None else int(self._state.lengths[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and of the snapshots."""
        return self._trail.nbytes + (0 if self._state is None else self._state.nbytes)

    @property
    def earliest(self) -> int:
        """The fewest tokens, above one, to which the tensors themselves go back, without a snapshot."""
        return 0 if self._state is None or not self.read_tokens else int(self._state.earliest[0]) + 1

    def fork(self) -> TextState:
        """A copy that goes its own way."""
        state = None if self._state is None else self._state.fork()
        return TextState(self._session, self._bundle, self._tokens, state, self.answer_from, self._trail.copy())

    def rewind(self, tokens: int) -> None:
        """Forget all but the first tokens.

        A recurrence, or a ring that has overwritten what it held then, goes back to the last snapshot before them, of
        which there is one about every 256 tokens and at most 16; what is between is read again with what comes next.

        Args:
            tokens: how many to keep.

        Raises:
            StateError: more than the text has.
        """
        keep = check_integer("tokens", tokens, 0)
        if keep > len(self):
            raise StateError(f"cannot rewind a text of {len(self)} tokens to {shown(keep)}; keep at most what it has")
        if self._state is not None and max(keep - 1, 0) < self.read_tokens:
            self._trail.rewind(self._state, max(keep - 1, 0))
        if self.read_tokens == 0:
            self._state = None
        del self._tokens[keep:]
        self.answer_from = min(self.answer_from, keep)

    def save(self, path: str | Path) -> None:
        """Write it to a file that ``Model.load_state`` reads, in another process too.

        Raises:
            StateError: the file cannot be written.
        """
        path = check_path("path", path)
        state = self._session.new_state() if self._state is None else self._state
        about = about_of(self._bundle) | {"tokens": self._tokens, "answer_from": self.answer_from}
        state.save(path, about=about, snapshots=self._trail.snapshots())

    @classmethod
    def load(cls, path: str | Path, session: Session, bundle: Bundle) -> Self:
        """Read what :meth:`save` wrote; see ``Model.load_state``, which calls it.

        Args:
            path: the file.
            session: that goes on from it.
            bundle: the session's.

        Raises:
            StateError: no such file, or a damaged one, or the state of another model or of another version of it.
        """
        path = check_path("path", path)
        check_instance("session", session, Session, "model.session is one")
        check_instance("bundle", bundle, Bundle, "model.bundle is one")
        state = load_for(path, session, bundle)
        return cls(session, bundle, *_text_of(path, state.about, state, session), trail_of(state))

    def read(
        self, tokens: Sequence[int], prefixes: Prefixes | None, progress: Callable[[int, int], None] | None
    ) -> TextState:
        """The state of a text that goes on from this one's, all but its last token read; ``Model.read`` calls it.

        Args:
            tokens: of the whole text.
            prefixes: what texts began with before; None: nothing is kept.
            progress: as of ``GenerationOptions``.
        """
        kept, trail, stops = self.resumed(self._session, len(tokens)), self.trail(), list[int]()
        if prefixes is not None and not kept.lengths[0]:
            _, stops = prefixes.resume(tokens[:-1], kept, trail)
        if unread := tokens[int(kept.lengths[0]) : -1]:
            read_text(self._session, unread, kept, trail, stops=stops, progress=progress)
        if prefixes is not None:
            prefixes.keep(tokens[:-1], kept, trail)
        return self.extended(tokens, kept, len(tokens), trail)

    def resumed(self, session: Session, capacity: int) -> State:
        """Tensors to go on with: a copy, with room for so many tokens.

        Args:
            session: that will step them.
            capacity: tokens.
        """
        if self._state is None:
            return session.new_state(1, capacity)
        return self._state.fork(max(capacity, 1))

    def trail(self) -> Trail:
        """The snapshots, for whoever goes on from here; these stay as they are."""
        return self._trail.copy()

    def extended(
        self, tokens: Sequence[int], state: State | None, answer_from: int, trail: Trail | None = None
    ) -> TextState:
        """The state of a text that goes on from this one's.

        Args:
            tokens: of the whole text.
            state: what has read of it; None: as much as here.
            answer_from: how many tokens come before the last answer.
            trail: the state's.
        """
        if state is None:
            state, trail = None if self._state is None else self._state.fork(), self._trail.copy()
        return TextState(self._session, self._bundle, tokens, state, answer_from, trail)

    def check_for(self, session: Session, bundle: Bundle) -> None:
        """See that a model may go on from here.

        Raises:
            StateError: it is another model's.
        """
        if session is not self._session and bundle.fingerprint != self._bundle.fingerprint:
            raise StateError(
                f"the state is {self._bundle.manifest.name}'s, another model or another version of it than "
                f"{bundle.manifest.name}; begin with new_state()"
            )
        if session.adapter != self._session.adapter:
            raise StateError(
                f"the state is of {_with(self._session.adapter)}, and this model has {_with(session.adapter)}; begin "
                "with new_state()"
            )


def about_of(bundle: Bundle) -> dict[str, Any]:
    """What is written beside a state, by which another model and another version are told."""
    return {"bundle": bundle.manifest.name, "fingerprint": bundle.fingerprint}


def load_for(path: Path, session: Session, bundle: Bundle) -> State:
    """A saved state that has :func:`about_of` this bundle beside it; nothing else that is there is believed yet.

    Args:
        path: the file.
        session: that goes on from it.
        bundle: the session's.

    Raises:
        StateError: no such file, or a damaged one, or the state of another model or of another version of it.
    """
    state = State.load(path, session.signature.state, session.storage, threads=session.threads)
    if "fingerprint" not in state.about:
        raise StateError(f"{path}: a state without its text, of State.save; load it with State.load")
    if state.about["fingerprint"] != bundle.fingerprint:
        raise StateError(
            f"{path}: the state of {shown(state.about.get('bundle'))}, another model or another version of it than "
            f"{bundle.manifest.name}; read the text again"
        )
    if not session.adapted(state):
        raise StateError(f"{path}: the state of another adapter than {_with(session.adapter)}; read the text again")
    return state


def _with(adapter: str | None) -> str:
    return "no adapter" if adapter is None else f"adapter {adapter}"


def trail_of(state: State) -> Trail:
    """The snapshots that were saved with a state."""
    trail = Trail(state.specs)
    trail.adopt(state.snapshots)
    return trail


def _text_of(path: Path, about: Any, state: State, session: Session) -> tuple[list[int], State | None, int]:
    """The text of a saved state, of which nothing is believed yet."""
    try:
        if type(about["tokens"]) is not list:
            raise OptionError("no list of tokens")
        tokens = check_tokens(about["tokens"], session.vocab_size)
        answer_from = check_integer("answer_from", about["answer_from"], 0, len(tokens))
        read = int(state.lengths[0])
        if state.batch != 1 or len(tokens) > session.max_context or read > max(len(tokens) - 1, 0):
            raise OptionError(f"{len(tokens)} tokens, of which {state.lengths.tolist()} were read")
    except (KeyError, OptionError) as error:
        raise StateError(f"{path}: its text is damaged ({error}); read the text again") from error
    return tokens, state if read else None, answer_from
