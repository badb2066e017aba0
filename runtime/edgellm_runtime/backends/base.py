"""What the session asks of a library that executes graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import BackendError
from edgellm_runtime.spec import UPDATES, Signature
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import HOST, Storage

if TYPE_CHECKING:
    from edgellm_runtime.backends.own_kernels import OwnKernels

__all__ = ["Backend", "Candidates", "HostBackend", "WithoutEncoder", "check_updates"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Candidates:
    """The most likely tokens of each row, chosen where the logits are.

    Args:
        ids: (batch, count), the likeliest first; of equals at the top the lower id.
        logits: (batch, count), theirs; NaN where a row's logits hold one.
        everything: fetches that step's logits (batch, vocab); for a choice that these do not settle.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    everything: Callable[[], NDArray[np.float32]]


class Backend(Protocol):
    """Runs one step; owns whatever its library needs for that."""

    device: str
    storage: Storage  # where its states live
    updates: Collection[str]  # of states, those that it can keep
    candidates: int  # how many tokens of a row it can choose by itself; 0: it hands out logits only

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """Run the encoder, and write what it makes of the sources into a state.

        Args:
            source: (batch, tokens).
            lengths: (batch,), how many of them are valid in each row.
            state: of as many rows, and made for sources of that length.

        Raises:
            BackendError: the library failed, or the device has no memory left.
        """
        ...

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> Array:
        """Run one step and update the state in place (not its lengths).

        Args:
            tokens: (batch, time).
            lengths: (batch,), how many of them are valid in each row.
            logit_positions: (batch, count), which of them to project to logits.
            state: read and written; has room for ``time`` more tokens in each row.

        Returns:
            Logits (batch, count, vocab), float32, which the next step may overwrite.

        Raises:
            BackendError: the library failed, or the device has no memory left.
        """
        ...

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """The same step, of a signature that has hidden states: logits, and (batch, time, features) in float32.

        The next step may overwrite both.
        """
        ...

    def best(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        count: int,
    ) -> Candidates:  # fmt: skip
        """The same step for one position a row, of whose logits only the best leave the device.

        Args:
            tokens: as for :meth:`run`.
            lengths: likewise.
            logit_positions: (batch, 1).
            state: likewise.
            count: how many a row, at most ``candidates``.
        """
        ...


class WithoutEncoder:
    """What backends share that run no encoder; loading refuses a bundle that has one before any is asked."""

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """Refused.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"{type(self).__name__} runs no encoder; load the bundle on device cpu")


class HostBackend(WithoutEncoder):
    """What a backend that computes in this process's memory shares with others of its kind."""

    storage: Storage = HOST
    updates: Collection[str] = UPDATES
    candidates = 0
    kernels: OwnKernels | None = None  # edgellm's own, which run some of the products

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """Never asked for, where no signature has hidden states."""
        raise AssertionError(f"{type(self).__name__} was asked for hidden states")

    def best(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        count: int,
    ) -> Candidates:  # fmt: skip
        """Never asked for: logits are where the sampler is."""
        raise AssertionError("a backend with candidates = 0 was asked for candidates")


def check_updates(backend: Backend, signature: Signature) -> None:
    """Make sure that a backend can keep every state of a model.

    Raises:
        BackendError: it cannot; the text names the state and the file that would have to learn it.
    """
    for spec in signature.state:
        if spec.update not in backend.updates:
            raise BackendError(
                f"device {backend.device} keeps no state of update {spec.update!r}, which {spec.name} is; load the "
                f"bundle on another device, or teach it to {type(backend).__module__.replace('.', '/')}.py"
            )
