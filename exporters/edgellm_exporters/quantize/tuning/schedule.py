"""How much is learned in so many minutes.

What minutes bring most is layers learned one by one, of more text and in more steps: so both grow with the minutes, and
all layers together come after that. It is the minutes that are asked for that count, not those that a machine needs, so
that the outcome is the same on a slower one as long as they suffice.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYERS_SHARE", "WRITING_SHARE", "Schedule", "schedule_of"]

WRITING_SHARE, LAYERS_SHARE = 0.25, 0.75  # of the minutes, at most, until which text is written and layers are learned
_STEPS_A_MINUTE, _FEWEST_STEPS, _MOST_STEPS = 6, 60, 240
_WINDOWS_A_MINUTE, _FEWEST_WINDOWS, _MOST_WINDOWS = 16, 128, 640
_OWN_TOKENS_A_MINUTE, _FEWEST_OWN, _MOST_OWN = 1024, 16_384, 40_960


@dataclass(frozen=True)
class Schedule:
    """How much is learned, at most.

    Args:
        steps: of each layer.
        layer_windows: of text that layers learn from, half of them the model's own as far as there are.
        own_tokens: that the model makes up itself.
    """

    steps: int
    layer_windows: int
    own_tokens: int


def schedule_of(minutes: float) -> Schedule:
    """What so many minutes are for."""
    return Schedule(
        _between(_FEWEST_STEPS, _STEPS_A_MINUTE * minutes, _MOST_STEPS),
        _between(_FEWEST_WINDOWS, _WINDOWS_A_MINUTE * minutes, _MOST_WINDOWS),
        _between(_FEWEST_OWN, _OWN_TOKENS_A_MINUTE * minutes, _MOST_OWN),
    )


def _between(least: int, wanted: float, most: int) -> int:
    return int(min(max(least, wanted), most))
