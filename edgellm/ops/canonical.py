"""How an op leaves its mark in a captured graph.

Every op in this package is a differentiable PyTorch function. While ``torch.export`` traces, it emits one node of the
``edgellm`` domain instead, which each export target lowers in its own way. Nothing here knows a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["DOMAIN", "VERSION", "capturing", "emit"]

DOMAIN = "edgellm"
VERSION = 1
Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str]


def capturing() -> bool:
    """Whether ``torch.export`` is tracing right now."""
    # what torch.compile traces it believes to be exported, too
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def emit(
    name: str, inputs: Sequence[Tensor | None], like: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
    attributes: Mapping[str, Attribute] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Put the node ``edgellm::name`` in the graph being traced.

    Args:
        name: the canonical op.
        inputs: its inputs, None where an optional one is left out.
        like: dtype and shape of each output.
        attributes: the node's attributes.

    Returns:
        The node's outputs, with the shapes and dtypes given.
    """
    outputs: Sequence[Tensor] = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        list(inputs),
        dict(attributes or {}),
        dtypes=[dtype for dtype, _ in like],
        shapes=[list(shape) for _, shape in like],
        version=VERSION,
    )
    return tuple(outputs)
