"""A drafter as a graph of its own: from hidden states and tokens to the next token that it proposes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgellm.draft_head import DraftHead
from edgellm.ops.canonical import DOMAIN
from edgellm.streaming import OwnWeights
from edgellm_exporters.graph.capture import OPSET, name_dimensions, name_weights, traced
from edgellm_exporters.graph.tracing import CanonicalFunctions, fake_parameters, no_collection
from edgellm_exporters.graph.translate import translated
from edgellm_runtime.bundle.draft_info import MOST_READ, draft_signature
from edgellm_runtime.spec import BATCH

__all__ = ["capture_drafter"]


class _Drafter(nn.Module):
    def __init__(self, head: DraftHead) -> None:
        super().__init__()
        self.model = head

    def forward(self, hidden: Tensor, token: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with CanonicalFunctions():
            found: tuple[Tensor, Tensor, Tensor] = self.model(hidden, token, first, state)
        return found


def capture_drafter(head: DraftHead) -> ir.Model:
    """Trace a drafter.

    Args:
        head: in eval mode.

    Returns:
        A graph of canonical ops and plain ONNX ops, named as :func:`edgellm_runtime.bundle.draft_info.draft_signature`
        says.
    """
    config = head.config
    signature = draft_signature(config.features, config.state)
    example: tuple[Any, ...] = (
        torch.zeros(2, 3, config.features), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1),
        torch.zeros(2, config.state),
    )  # fmt: skip
    batch, time = torch.export.Dim(BATCH), torch.export.Dim("time", max=MOST_READ)
    free: tuple[Any, ...] = ({0: batch, 1: time}, {0: batch, 1: time}, {0: batch}, {0: batch})
    names = [t.name for t in signature.inputs] + [s.past_name for s in signature.state]
    outputs = [t.name for t in signature.outputs] + [s.present_name for s in signature.state]
    with fake_parameters(head), no_collection():
        program = traced(_Drafter(head).eval(), example, free)
        captured = translated(program, names, outputs, opset=OPSET)
    captured.opset_imports.setdefault(DOMAIN, 1)
    name_weights(captured, head, OwnWeights(head))
    name_dimensions(captured, signature)
    return captured
