"""A bundle's prefill and decode graphs on ONNX Runtime's CPU kernels: how engines are checked without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.backends.graph_roles import GraphRoles
from edgellm_runtime.backends.ort import OrtBackend
from edgellm_runtime.errors import BackendError
from edgellm_runtime.spec import Signature
from edgellm_runtime.state import State

__all__ = ["OrtRolesBackend"]


class OrtRolesBackend(HostBackend):
    """Follows :class:`edgellm_runtime.backends.Backend`.

    Args:
        directory: where the graphs are, already checked.
        roles: the graphs.
        signature: what they share.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        encoder: the graph that reads sources, already checked; None: the model reads none.
        fetch: names of further values of the graphs, (batch, time, ...), which :attr:`fetched` holds after each step.

    Raises:
        BackendError: the library is missing, or refuses a graph.
    """

    def __init__(
        self, directory: Path, roles: GraphRoles, signature: Signature, *, threads: int | None = None,
        encoder: Path | None = None, fetch: Sequence[str] = (),
    ) -> None:  # fmt: skip
        narrow = sorted({spec.dtype for spec in signature.state} & {"bfloat16"})
        if narrow:
            raise BackendError(f"{directory}: ONNX Runtime has no {narrow[0]} kernels on CPU; use device='tensorrt'")
        self.roles, self.device = roles, "cpu"
        self.fetched: dict[str, NDArray[Any]] = {}
        self._graphs = {
            role.name: OrtBackend(
                directory / role.file, signature, threads=threads, fusions=False, fetch=fetch,
                encoder=encoder if role is roles.all[-1] else None,
            )
            for role in roles.all
        }  # fmt: skip

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """See :meth:`edgellm_runtime.backends.Backend.encode`."""
        self._graphs[self.roles.all[-1].name].encode(source, lengths, state)

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> NDArray[Any]:
        """See :meth:`edgellm_runtime.backends.Backend.run`."""
        role = self.roles.choose(tokens.shape[1])
        graph = self._graphs[role.name]
        logits = graph.run(role.pad(tokens), lengths, logit_positions, state)
        self.fetched = {name: value[:, : tokens.shape[1]] for name, value in graph.fetched.items()}
        return logits

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """See :meth:`edgellm_runtime.backends.Backend.run_hidden`."""
        role = self.roles.choose(tokens.shape[1])
        logits, hidden = self._graphs[role.name].run_hidden(role.pad(tokens), lengths, logit_positions, state)
        return logits, hidden[:, : tokens.shape[1]]
