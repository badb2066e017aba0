"""A checkpoint in PyTorch as ``edgellm bench --against`` measures it, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["opened"]


def opened(path: str, threads: int) -> tuple[Any, str]:
    """A session of a checkpoint, in float32 and eager, and whose kernels run it.

    Args:
        path: of any kind of checkpoint.
        threads: of PyTorch.

    Raises:
        OptionError: it cannot be read.
    """
    import torch

    from edgellm.cli.checkpoints import read_checkpoint
    from edgellm.errors import ModelError
    from edgellm_exporters.errors import ExportError
    from edgellm_exporters.proof.torch_backend import torch_session
    from edgellm_runtime.errors import OptionError

    torch.set_num_threads(threads)
    try:
        model: Any = read_checkpoint(Path(path), in_memory=True).model  # torch_session checks what it follows
        return torch_session(model), "PyTorch"
    except (ModelError, ExportError) as error:
        raise OptionError(str(error)) from error
