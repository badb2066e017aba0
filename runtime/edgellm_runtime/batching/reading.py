"""A prompt that is read piece by piece, from where one that began alike has been read to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.generation.logprobs import TokenLogprobs, logprobs_of
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.trail import Trail
from edgellm_runtime.session import Session, Wanted

__all__ = ["Reading"]

_PIECE = 64  # tokens whose logits are there at once: of a vocabulary of 150,000 they take 38 MB


class Reading:
    """One prompt.

    Args:
        session: steps the model.
        prompt: its tokens.
        room: the most tokens that its row will hold.
        piece: so many tokens at once.
        prefixes: what prompts began with before; None: each is read whole.
        logprobs: so many of the most probable tokens are noted beside each of the prompt's, which is then read whole.
        source: what the prompt begins an answer to, and an encoder reads now; None: the model answers no sources.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], room: int, piece: int, prefixes: Prefixes | None,
        logprobs: int | None = None, source: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        prefixes = prefixes if logprobs is None else None
        piece = piece if logprobs is None else min(piece, _PIECE)
        self._session, self._prompt, self._piece, self._prefixes = session, prompt, piece, prefixes
        self._count, self.logprobs = logprobs, None if logprobs is None else list[TokenLogprobs]()
        if source is None:
            self.state = session.new_state(1, room)
        else:
            self.state = session.new_state(capacity=room, sources=[source])
        self.read = self.cached = 0
        self.trail: Trail | None = None  # where a cache is kept
        self._stops: list[int] = []
        if prefixes is not None:
            self.trail = Trail(session.signature.state)
            self.cached, more = prefixes.resume(prompt[:-1], self.state, self.trail)  # the last one's logits are needed
            self._stops = self.trail.stops(self.cached, len(prompt), more)
            self.read = self.cached

    def go_on(self) -> NDArray[np.float32] | None:
        """Read a piece; the logits (1, vocab) of the prompt's last token, once that has been read."""
        end = min([self.read + self._piece, len(self._prompt), *(stop for stop in self._stops if stop > self.read)])
        last = end == len(self._prompt)
        piece = np.array([self._prompt[self.read : end]], dtype=np.int64)
        wanted: Wanted = "all" if self.logprobs is not None else "last" if last else "none"
        logits = self._session.step(piece, self.state, logits=wanted)
        self._note(logits[0])
        self.read = end
        if self._prefixes is not None and self.trail is not None:
            if last or end in self._stops:
                self.trail.mark(self.state)
            if last:
                self._prefixes.keep(self._prompt, self.state, self.trail)
        return logits[:, -1] if last else None

    def _note(self, logits: NDArray[np.float32]) -> None:
        """How probable each token was after the one before it; the first came after none."""
        if self.logprobs is None or self._count is None:
            return
        following = self._prompt[self.read + 1 : self.read + 1 + len(logits)]
        self.logprobs += [logprobs_of(x, token, self._count) for x, token in zip(logits, following, strict=False)]
