"""What the session asks of a library that executes graphs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.state import State

__all__ = ["Backend"]


class Backend(Protocol):
    """Runs one step; owns whatever its library needs for that."""

    device: str

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> NDArray[Any]:
        """Run one step and update the state in place (not its lengths).

        Args:
            tokens: (batch, time).
            lengths: (batch,), how many of them are valid in each row.
            logit_positions: (batch, count), which of them to project to logits.
            state: read and written; has room for ``time`` more tokens in each row.

        Returns:
            Logits (batch, count, vocab), which the next step may overwrite.
        """
        ...
