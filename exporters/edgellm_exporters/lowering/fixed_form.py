"""What a graph of fixed sizes is made for: its role, the tokens of a step, the slots of the cache, its precision."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DECODE", "PREFILL", "Form"]

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Form:
    """The sizes and the precision of one graph.

    Args:
        role: :data:`PREFILL`, which may be asked for the logits of several positions, or :data:`DECODE`, which reads
            one token a row.
        time: tokens of each row in a step.
        capacity: slots for tokens in each row of the state.
        dtype: of activations, state and weights that are not quantized.
        rounded: a narrower dtype that weights are rounded to first, for a graph that is to compute in ``dtype`` what a
            graph in the narrower one means; empty for none.
    """

    role: str
    time: int
    capacity: int
    dtype: str
    rounded: str = ""
