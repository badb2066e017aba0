"""A module of another precision, in float32 while it is exported: what every target has kernels for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgellm.models.protocol import LanguageModel
from edgellm_exporters.errors import CaptureError

__all__ = ["widened"]

_STATES = ("float16", "bfloat16", "float64")


@contextmanager
def widened(model: LanguageModel) -> Iterator[str]:
    """Read a model's weights and buffers as float32, in which 16 bits lose nothing, and give them back afterwards.

    Args:
        model: changed in place for as long as the block runs.

    Yields:
        What to tell people, or nothing where all is float32.

    Raises:
        CaptureError: a state that is declared in such a precision, for whoever wrote it must change it.
    """
    assert isinstance(model, nn.Module)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and not t.is_meta]
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype != torch.float32]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        if narrow := next((spec for spec in model.state_specs() if spec.dtype in _STATES), None):
            raise CaptureError(
                f"state {narrow.name!r} is declared {narrow.dtype}; declare float32, for --dtype says what a bundle "
                "keeps it in"
            )
        names = sorted({str(data.dtype).removeprefix("torch.") for _, data in kept})
        yield f"the model's {' and '.join(names)} weights were read as float32" if names else ""
    finally:
        for tensor, data in kept:
            tensor.data = data
