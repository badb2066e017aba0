"""What may change the logits before a token is chosen from them: a chain of processors, of which anyone can write one.

Importing this file loads no NumPy, so that the protocol can be named without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgellm_runtime.arguments import check_number, shown
from edgellm_runtime.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LogitsProcessor", "RepetitionPenalty", "apply_processors"]


class LogitsProcessor(Protocol):
    """Changes a row's logits before its next token is chosen.

    It is called once for each token of each row, the rows of a batch one after another. A processor that keeps
    something between calls should derive it from ``tokens``, since rows leave a batch when they end; the first call for
    a row has the tokens of its prompt.
    """

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> NDArray[np.float32] | None:
        """Change the logits.

        Args:
            tokens: (length,), all that the row holds so far, prompt included; not to be changed.
            logits: (vocabulary,), those of the next token; may be changed in place. Minus infinity forbids a token.

        Returns:
            The logits to go on with, or None for ``logits`` as they now are.
        """
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of every token that a row holds (Keskar 2019, arXiv:1909.05858).

    Args:
        penalty: above 1 discourages, below 1 encourages; 1 does nothing.

    Raises:
        OptionError: the penalty is outside 0.01 to 100.
    """

    penalty: float

    def __post_init__(self) -> None:
        check_number("repetition_penalty", self.penalty, 0.01, 100)

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /) -> None:
        """See :class:`LogitsProcessor`."""
        import numpy as np

        values = logits[tokens]  # a token that is there twice is read before either is written
        logits[tokens] = np.where(values > 0, values / self.penalty, values * self.penalty)


def apply_processors(
    chain: Sequence[LogitsProcessor], tokens: NDArray[np.int64], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Run a chain over a row.

    Args:
        chain: in order.
        tokens: (length,) that the row holds.
        logits: (vocabulary,); left as they are.

    Returns:
        The changed logits, float32.

    Raises:
        OptionError: a processor returned something else than as many numbers, or no token is left possible.
    """
    import numpy as np

    changed = np.array(logits, dtype=np.float32)
    for processor in chain:
        returned: Any = processor(tokens, changed)
        if returned is None:
            continue
        found = np.asarray(returned)
        if found.shape != logits.shape or found.dtype.kind not in "fiu":
            raise OptionError(
                f"the logits processor {shown(processor)} returned {found.dtype} of shape {found.shape}; it must "
                f"return {logits.shape[0]} numbers, one for each token, or None"
            )
        changed = found.astype(np.float32)  # a copy: the processor may have kept what it returned
    best = changed.max()
    if not np.isfinite(best) and np.isfinite(logits.max()):
        raise OptionError(
            f"the logits processors leave a best logit of {best}; they must leave a token possible, and no NaN"
        )
    return changed
