"""From a PyTorch module to a graph of canonical ops, guided by nothing but the state that the module declares.

The graph has four inputs besides the state (see :data:`INPUTS`), so that one trace serves prefill, decode, evaluation
and ragged batches. Nothing here knows an architecture or a target.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm.ops.canonical import DOMAIN, emit
from edgellm_runtime.spec import BATCH, CAPACITY, Signature, StateSpec, TensorSpec
from torch import Tensor, nn

from edgellm_exporters.errors import CaptureError

__all__ = ["INPUTS", "OPSET", "capture", "signature_of"]

OPSET = 23
INPUTS = (
    TensorSpec("tokens", (BATCH, "time"), "int64"),
    TensorSpec("past_lengths", (BATCH,), "int32"),
    TensorSpec("lengths", (BATCH,), "int32"),
    TensorSpec("logit_positions", (BATCH, "count"), "int64"),
)
# Sizes of the example: torch.export bakes 0 and 1 in, and equal sizes would hide a dimension that was mixed up.
_EXAMPLE = {BATCH: 2, "time": 5, "count": 3, CAPACITY: 11}


def signature_of(model: LanguageModel) -> Signature:
    """What the captured graph takes, gives and carries."""
    dtype = next((str(p.dtype).removeprefix("torch.") for _, p in model.named_parameters()), "float32")
    logits = TensorSpec("logits", (BATCH, "count", model.config.vocab_size), dtype)
    return Signature(INPUTS, (logits,), tuple(model.state_specs()))


def capture(model: LanguageModel) -> ir.Model:
    """Trace a model once.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`; in eval mode.

    Returns:
        A graph of canonical ops (domain ``edgellm``) and plain ONNX ops, its inputs and outputs named by the signature.

    Raises:
        CaptureError: the module's forward depends on sizes or values that a graph cannot follow, or changes the state.
    """
    if not isinstance(model, nn.Module) or not isinstance(model, LanguageModel):
        raise CaptureError(
            f"{type(model).__name__} is not an nn.Module with config, state_specs() and forward(tokens, state, step); "
            "see docs/embedding.md, 'A model of your own'"
        )
    signature = signature_of(model)
    program = _trace(model, signature)
    names = [t.name for t in signature.inputs] + [s.past_name for s in signature.state]
    outputs = [t.name for t in signature.outputs] + [s.present_name for s in signature.state]
    with _quiet():
        exported = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=names, output_names=outputs,
        )  # fmt: skip
    if exported is None:
        raise CaptureError("torch.onnx.export gave no graph")
    captured = exported.model
    captured.opset_imports.setdefault(DOMAIN, 1)
    _name_dimensions(captured, signature)
    return captured


class _OneGraph(nn.Module):
    """The model with its state as a flat list, in the order of its specs."""

    def __init__(self, model: nn.Module, specs: Sequence[StateSpec]) -> None:
        super().__init__()
        self.model, self.specs = model, specs

    def forward(
        self, tokens: Tensor, past_lengths: Tensor, lengths: Tensor, logit_positions: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        past = {spec.name: tensor for spec, tensor in zip(self.specs, state, strict=True)}
        logits, present = self.model(tokens, past, Step(past_lengths, lengths, logit_positions))
        if missing := [spec.name for spec in self.specs if spec.name not in present]:
            raise CaptureError(f"the model's forward gave no new state for {missing}, which state_specs() declares")
        return logits, [present[spec.name] for spec in self.specs]


def _trace(model: LanguageModel, signature: Signature) -> torch.export.ExportedProgram:
    assert isinstance(model, nn.Module)
    was_training = model.training
    wrapped = _OneGraph(model, signature.state).eval()
    try:
        with _quiet():
            program = torch.export.export(
                wrapped, _example(model, signature), dynamic_shapes=_dynamic_shapes(signature), strict=False
            )
            return program.run_decompositions(_CANONICAL)  # type: ignore[arg-type]
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds; each means: not one graph
        reason = " ".join(str(error).split())[:600]
        raise CaptureError(f"{type(model).__name__} cannot be traced as one graph: {reason}") from error
    finally:
        model.train(was_training)


def _example(model: LanguageModel, signature: Signature) -> tuple[Any, ...]:
    size = _EXAMPLE
    lengths = torch.tensor([size["time"], size["time"] - 1], dtype=torch.int32)
    return (
        torch.zeros(size[BATCH], size["time"], dtype=torch.int64),
        torch.zeros(size[BATCH], dtype=torch.int32),
        lengths,
        torch.zeros(size[BATCH], size["count"], dtype=torch.int64),
        list(empty_state(model, size[BATCH], size[CAPACITY]).values()),
    )


def _dynamic_shapes(signature: Signature) -> tuple[Any, ...]:
    dims = {name: torch.export.Dim(name) for name in _EXAMPLE}

    def dynamic(shape: Sequence[int | str]) -> dict[int, Any]:
        return {axis: dims[dim] for axis, dim in enumerate(shape) if isinstance(dim, str)}

    return (*(dynamic(t.shape) for t in signature.inputs), [dynamic(s.shape) for s in signature.state])


def _name_dimensions(captured: ir.Model, signature: Signature) -> None:
    shapes = {t.name: t.shape for t in (*signature.inputs, *signature.outputs)}
    shapes |= {name: s.shape for s in signature.state for name in (s.past_name, s.present_name)}
    for value in (*captured.graph.inputs, *captured.graph.outputs):
        assert value.name is not None and value.shape is not None
        wanted = shapes[value.name]
        for axis, dim in enumerate(wanted):
            if isinstance(dim, str) and isinstance(value.shape[axis], int):
                raise CaptureError(
                    f"{value.name}: dimension {axis} was fixed at {value.shape[axis]} while tracing, but must follow "
                    f"{dim!r}; the forward must not depend on the example's sizes"
                )
        value.shape = ir.Shape(wanted)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return emit("Linear", [x, weight, bias], [(x.dtype, (*x.shape[:-1], weight.shape[0]))])[0]


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return emit("Embedding", [weight, indices], [(weight.dtype, (*indices.shape, weight.shape[1]))])[0]


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if len(shape) != 1:
        raise CaptureError(f"rms_norm over {len(shape)} axes cannot be exported; normalise the last axis only")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    weight = torch.ones(shape[0], dtype=x.dtype) if weight is None else weight
    return emit("RMSNorm", [x, weight], [(x.dtype, x.shape)], {"epsilon": eps})[0]


# PyTorch's own ops that stay whole in the graph, so that quantizers and targets see them as they were written.
_CANONICAL = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.embedding.default: _embedding,
    torch.ops.aten.rms_norm.default: _rms_norm,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter about torchvision and its own deprecations; errors still pass."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
