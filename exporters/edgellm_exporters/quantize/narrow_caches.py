"""Which states a bundle keeps in fewer bits than the model, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_runtime.spec import Signature

__all__ = ["NarrowCaches"]


@dataclass(frozen=True)
class NarrowCaches:
    """States in 8 bits or in float16, one or the other.

    Args:
        scales: of the states in 8 bits, by name, (heads * head_dim,).
        halves: names of the states in float16.
        left: states that were asked for in fewer bits and stay as they are, with the reasons.
    """

    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    halves: frozenset[str] = frozenset()
    left: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scales or self.halves)

    @property
    def dtype(self) -> str:
        """Of the states that are kept in fewer bits."""
        return "float16" if self.halves else "int8"

    @property
    def names(self) -> frozenset[str]:
        """Of the states that are kept in fewer bits."""
        return self.halves | self.scales.keys()

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest's ``quantization`` says of them, and of those that are left."""
        found: dict[str, Any] = {"cache": sorted(self.names)} if self else {}
        if self.halves:
            found["cache_dtype"] = self.dtype
        return found | ({"cache_left": dict(self.left)} if self.left else {})

    def declared(self, signature: Signature) -> Signature:
        """A signature that says so."""
        state = (dataclasses.replace(s, dtype=self.dtype) if s.name in self.names else s for s in signature.state)
        return dataclasses.replace(signature, state=tuple(state))

    def declare(self, graph: ir.Model) -> None:
        """Have a lowered graph say so, in place."""
        ends = {f"{end}.{name}" for name in self.names for end in ("past", "present")}
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            if value.name in ends:
                value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(self.dtype)))
