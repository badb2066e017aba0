"""What a manifest says of a drafter: the graph that proposes tokens from hidden states, with a state of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.spec import BATCH, Signature, StateSpec, TensorSpec

__all__ = ["DRAFTER", "MOST_READ", "DraftInfo", "draft_signature"]

DRAFTER = "drafter.onnx"  # its usual name
LOOSEST = 0.5  # of a bound
MOST_READ = 8  # tokens that a drafter reads at once
_TIME = "time"
_MOST = 1 << 20  # features, or numbers of a state


@dataclass(frozen=True)
class DraftInfo:
    """The drafter of a bundle that gives hidden states.

    Args:
        file: the graph's name in the bundle.
        width: numbers of its state.
        bound: what ``verify`` holds it to.
    """

    file: str
    width: int
    bound: float

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "width": self.width, "bound": self.bound}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DraftInfo:
        """Check and read what :meth:`to_json` gave.

        Raises:
            ValueError: a value that no drafter has.
        """
        file, width, bound = data["file"], data["width"], data["bound"]
        if not isinstance(file, str) or not file.endswith(".onnx"):
            raise ValueError(f"drafter {file!r} is not named as a graph")
        if type(width) is not int or not 1 <= width <= _MOST:
            raise ValueError(f"a drafter's state of {width!r} numbers; of 1 to {_MOST}")
        if type(bound) not in (int, float) or not math.isfinite(bound) or not 0 <= bound <= LOOSEST:
            raise ValueError(f"a drafter's bound of {bound!r}; from 0 to {LOOSEST}")
        return cls(file, width, float(bound))


def draft_signature(features: int, width: int) -> Signature:
    """What the graph of a drafter takes, gives and carries.

    Args:
        features: of a hidden state.
        width: of its own state.
    """
    inputs = (
        TensorSpec("hidden", (BATCH, _TIME, features), "float32"), TensorSpec("token", (BATCH, _TIME), "int64"),
        TensorSpec("first", (BATCH, 1), "float32"),
    )  # fmt: skip
    outputs = (TensorSpec("next", (BATCH,), "int64"), TensorSpec("chance", (BATCH,), "float32"))
    return Signature(inputs, outputs, (StateSpec("draft", (BATCH, width), "float32", "replace"),))
