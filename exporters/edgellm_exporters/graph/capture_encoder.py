"""The encoder of a model that answers sources, as a graph of its own: from sources to the states that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgellm.models.protocol import LanguageModel, SourceModel, answers_sources
from edgellm.ops.canonical import DOMAIN
from edgellm.streaming import OwnWeights, Weights
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.graph.capture import (
    OPSET,
    capture,
    check_model,
    name_dimensions,
    name_weights,
    signature_of,
    traced,
)
from edgellm_exporters.graph.faults import let_interrupt_through, quiet, reason
from edgellm_exporters.graph.tracing import CanonicalFunctions, fake_parameters, no_collection
from edgellm_exporters.graph.translate import translated
from edgellm_runtime.spec import BATCH, SOURCE, Signature

__all__ = ["Graphs", "capture_encoder", "capture_graphs"]

_EXAMPLE = {BATCH: 2, SOURCE: 7}


class Graphs(NamedTuple):
    """What an export makes of a model: the graph that steps and, where it answers sources, the one that reads them."""

    step: ir.Model
    encoder: ir.Model | None = None

    @property
    def all(self) -> tuple[ir.Model, ...]:
        """Those that there are."""
        return (self.step,) if self.encoder is None else (self.step, self.encoder)


def capture_graphs(model: LanguageModel, weights: Weights | None = None, *, hidden: bool = False) -> Graphs:
    """Trace a model once, and its encoder if it has one; arguments and errors as :func:`capture`."""
    encoder = capture_encoder(model, weights) if answers_sources(model) else None
    return Graphs(capture(model, weights, hidden=hidden), encoder)


def capture_encoder(model: LanguageModel, weights: Weights | None = None) -> ir.Model:
    """Trace the encoder of a model that answers sources.

    Args:
        model: follows :class:`edgellm.models.protocol.SourceModel`; in eval mode, on any device.
        weights: where the parameters are read from; None for the model's own.

    Returns:
        A graph of canonical ops and plain ONNX ops, as :func:`capture` gives it for steps.

    Raises:
        CaptureError: ``encode`` depends on sizes or values that a graph cannot follow, or gives other states than
            ``state_specs()`` says.
    """
    check_model(model)
    assert isinstance(model, nn.Module) and isinstance(model, SourceModel)
    signature = signature_of(model).encoder
    with fake_parameters(model), no_collection():
        program = _trace(model, signature)
        names = [[t.name for t in tensors] for tensors in (signature.inputs, signature.outputs)]
        captured = translated(program, *names, opset=OPSET)
    captured.opset_imports.setdefault(DOMAIN, 1)
    name_weights(captured, model, weights or OwnWeights(model))
    name_dimensions(captured, signature)
    return captured


class _Encoder(nn.Module):
    """What ``encode`` gives as a flat list, in the order of the specs."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, source: Tensor, lengths: Tensor) -> list[Tensor]:
        with CanonicalFunctions():
            made: Mapping[str, Tensor] = self.model.encode(source, lengths)  # type: ignore[operator]
        if found := sorted(made.keys() ^ set(self.outputs)):
            raise CaptureError(f"encode() gives or leaves out {found}, otherwise than state_specs() says; correct one")
        return [made[name] for name in self.outputs]


def _trace(model: nn.Module, signature: Signature) -> torch.export.ExportedProgram:
    was_training = model.training
    wrapped = _Encoder(model, [t.name.removeprefix("present.") for t in signature.outputs]).eval()
    example: tuple[Any, ...] = (
        torch.zeros(_EXAMPLE[BATCH], _EXAMPLE[SOURCE], dtype=torch.int64),
        torch.tensor([_EXAMPLE[SOURCE], _EXAMPLE[SOURCE] - 1], dtype=torch.int32),
    )
    dims = {name: torch.export.Dim(name) for name in _EXAMPLE}
    shapes = tuple({axis: dims[str(dim)] for axis, dim in enumerate(t.shape)} for t in signature.inputs)
    try:
        with quiet():
            return traced(wrapped, example, shapes)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means: not one graph
        let_interrupt_through(error)
        raise CaptureError(f"the encoder of {type(model).__name__} cannot be traced: {reason((), error)}") from error
    finally:
        model.train(was_training)
