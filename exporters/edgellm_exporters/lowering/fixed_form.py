"""What a graph of an engine is made for: its role, the tokens of a step, the slots of the cache, its precision."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_runtime.bundle.engine_info import ENCODE, ROLES

__all__ = ["DECODE", "ENCODE", "FREE", "PREFILL", "Form"]

PREFILL, DECODE = ROLES
FREE = 0  # a size that is no fixed one


@dataclass(frozen=True)
class Form:
    """The sizes and the precision of one graph.

    Args:
        role: :data:`PREFILL`, which may be asked for the logits of several positions, :data:`DECODE`, which reads one
            token a row, or :data:`ENCODE`, which reads sources of any length.
        time: tokens of each row in a step; :data:`FREE` where they are a source's.
        capacity: slots for tokens in each row of the state; :data:`FREE` where there is no cache.
        dtype: of activations, state and weights that are not quantized.
        rounded: a narrower dtype that weights are rounded to first, for a graph that is to compute in ``dtype`` what a
            graph in the narrower one means; empty for none.
    """

    role: str
    time: int
    capacity: int
    dtype: str
    rounded: str = ""
