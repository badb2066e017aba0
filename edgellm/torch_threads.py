"""PyTorch's CPU threads: as many as the rest of edgellm uses, and none that spins while others want the cores."""

from __future__ import annotations

import os
import sys

from edgellm_runtime.threads import available_cores, chosen_threads, thread_count

__all__ = ["let_torch_wait", "limit_torch_threads"]

_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_torch_wait() -> None:
    """Have PyTorch's threads sleep while they wait, unless the environment says how; before PyTorch's first import.

    Spinning is a little faster on an idle machine. Beside busy processes it costs a hundred times what they take: all
    threads spin until the one that has the work gets a core.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SPINNING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def limit_torch_threads(asked: int | None = None) -> None:
    """Set PyTorch's number of threads for this process.

    Args:
        asked: how many; None for what ``--threads`` or ``EDGELLM_THREADS`` says, else for PyTorch's own number
            (``OMP_NUM_THREADS``) or the cores that this process may use, whichever is less.

    Raises:
        OptionError: as for :func:`edgellm_runtime.threads.thread_count`.
    """
    let_torch_wait()
    import torch

    chosen = chosen_threads() if asked is None else thread_count(asked)
    torch.set_num_threads(chosen or min(torch.get_num_threads(), available_cores()))
