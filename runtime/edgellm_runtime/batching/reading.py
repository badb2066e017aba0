"""A prompt that is read piece by piece, from where one that began alike has been read to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.trail import Trail
from edgellm_runtime.session import Session

__all__ = ["Reading"]


class Reading:
    """One prompt.

    Args:
        session: steps the model.
        prompt: its tokens.
        room: the most tokens that its row will hold.
        piece: so many tokens at once.
        prefixes: what prompts began with before; None: each is read whole.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], room: int, piece: int, prefixes: Prefixes | None
    ) -> None:
        self._session, self._prompt, self._piece, self._prefixes = session, prompt, piece, prefixes
        self.state = session.new_state(1, room)
        self.read = self.cached = 0
        self._stops: list[int] = []
        if prefixes is not None:
            self._trail = Trail(session.signature.state)
            self.cached, more = prefixes.resume(
                prompt[:-1], self.state, self._trail
            )  # the last one's logits are needed
            self._stops = self._trail.stops(self.cached, len(prompt), more)
            self.read = self.cached

    def go_on(self) -> NDArray[np.float32] | None:
        """Read a piece; the logits (1, vocab) of the prompt's last token, once that has been read."""
        end = min([self.read + self._piece, len(self._prompt), *(stop for stop in self._stops if stop > self.read)])
        last = end == len(self._prompt)
        piece = np.array([self._prompt[self.read : end]], dtype=np.int64)
        logits = self._session.step(piece, self.state, logits="last" if last else "none")
        self.read = end
        if self._prefixes is not None:
            if last or end in self._stops:
                self._trail.mark(self.state)
            if last:
                self._prefixes.keep(self._prompt, self.state, self._trail)
        return logits[:, 0] if last else None
