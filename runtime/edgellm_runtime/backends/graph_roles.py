"""Which of a bundle's graphs runs a step, and what the step must look like for it.

A bundle of graphs of fixed sizes has one for prompts and one for single tokens, which share signature and state. This
is the shape logic that every library that runs them needs: no library is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.bundle.engine_info import GraphInfo
from edgellm_runtime.errors import BackendError

__all__ = ["GraphRole", "GraphRoles"]


@dataclass(frozen=True)
class GraphRole:
    """One graph of fixed time.

    Args:
        name: ``prefill`` or ``decode``.
        file: the graph's name in the bundle.
        time: tokens of each row in a step.
    """

    name: str
    file: str
    time: int

    def pad(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens (batch, up to time) followed by zeros to (batch, time); ``lengths`` say which of them are valid."""
        batch, time = tokens.shape
        if time == self.time:
            return tokens
        padded = np.zeros((batch, self.time), dtype=np.int64)
        padded[:, :time] = tokens
        return padded


class GraphRoles:
    """The graphs of one bundle.

    Args:
        graphs: the manifest's.
    """

    def __init__(self, graphs: Mapping[str, GraphInfo]) -> None:
        self.all = tuple(
            sorted((GraphRole(name, info.file, info.time) for name, info in graphs.items()), key=lambda role: role.time)
        )

    @classmethod
    def of(cls, manifest: Any) -> GraphRoles:
        """Those of a :class:`edgellm_runtime.bundle.Manifest`."""
        return cls(manifest.graphs)

    @property
    def longest(self) -> int:
        """The most tokens of a row in one step."""
        return self.all[-1].time

    def choose(self, time: int) -> GraphRole:
        """The graph with the least padding for a step of so many tokens.

        Raises:
            BackendError: none is that long; the session cuts longer steps.
        """
        for role in self.all:
            if time <= role.time:
                return role
        raise BackendError(f"a step of {time} tokens, but the longest graph takes {self.longest}; cut it into steps")
