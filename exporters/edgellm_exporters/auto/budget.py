"""What automatic quantization has to keep to, and the text that it needs for that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm_exporters.auto.rates import Rates
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.calibrate import MIN_TOKENS
from edgellm_exporters.quantize.methods import METHODS
from edgellm_exporters.quantize.plan import ROW, Scheme

__all__ = ["AUTO", "HELD_OUT_TOKENS", "PREFERENCES", "Budget", "bounds_of", "divide"]

AUTO = "auto"
PREFERENCES = ("decode", "prefill", "size", "quality")
HELD_OUT_TOKENS, MIN_HELD_OUT = 2048, 1024
_GOLDEN_FACTOR = 3.0  # goldens are some 90 tokens: their mean scatters about that of the held-out text by a factor of 2


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a bundle may cost in quality and in bytes, and what it is to be best at.

    Args:
        max_kl: mean KL divergence from the float model on held-out text, nats a token.
        max_size_mb: the bundle's files together, in units of 1,000,000 bytes; None for any.
        prefer: what to make best within that: ``decode`` time of a token, ``prefill`` time of a prompt, ``size``, or
            ``quality``, which spends all of the size on the KL divergence.
        rates: what formats take for a token, as measured; None for a table of one kind of machine, which is the same
            everywhere.

    Raises:
        QuantizeError: a limit that is no positive number, or an unknown preference.
    """

    max_kl: float = 0.02
    max_size_mb: float | None = None
    prefer: str = "decode"
    rates: Rates | None = None

    def __post_init__(self) -> None:
        for name, limit in (("KL", self.max_kl), ("size", self.max_size_mb)):
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise QuantizeError(f"a {name} of at most {limit} is no budget; give a positive number")
        if self.prefer not in PREFERENCES:
            raise QuantizeError(f"unknown preference {self.prefer!r}; there are {', '.join(PREFERENCES)}")

    @property
    def max_bytes(self) -> float:
        """The size limit in bytes, infinite if there is none."""
        return math.inf if self.max_size_mb is None else self.max_size_mb * 1e6


def bounds_of(budget: Budget, schemes: Mapping[str, Scheme]) -> dict[str, float]:
    """What the bundle's goldens must hold to.

    The held-out text has judged the KL already. Goldens are few tokens of other text and are allowed three times as
    much; the other bounds are those of the named method with the same kind of formats.
    """
    four = any(scheme.bits < 8 for scheme in schemes.values())
    row = any(scheme.block == ROW for scheme in schemes.values())
    like = METHODS["int4" if four else "w8a8" if row else "keep"]
    return {**like.bounds, "kl": _GOLDEN_FACTOR * budget.max_kl}


def divide(tokens: Sequence[int], length: int, most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate with from a text's beginning, and held-out windows from its end, with no token in both.

    Args:
        tokens: the whole text.
        length: of a window.
        most: tokens to calibrate with.

    Raises:
        QuantizeError: too little text for both.
    """
    length = min(length, MIN_HELD_OUT)
    least = [-(-n // length) for n in (MIN_TOKENS, MIN_HELD_OUT)]  # windows
    whole = len(tokens) // length
    if whole < sum(least):
        raise QuantizeError(
            f"the calibration text has {len(tokens)} tokens; --quantize auto needs {sum(least) * length}: "
            f"{least[0] * length} to calibrate with and {least[1] * length} others to verify on; give a longer text"
        )
    held = min(max(least[1], whole // 4), -(-HELD_OUT_TOKENS // length))
    used = min(whole - held, max(least[0], most // length))
    end = len(tokens) - held * length
    return _windows(tokens[: used * length], length), _windows(tokens[end:], length)


def _windows(tokens: Sequence[int], length: int) -> list[list[int]]:
    return [list(tokens[i : i + length]) for i in range(0, len(tokens), length)]
