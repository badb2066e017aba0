"""A PyTorch model behind the runtime's session, so that both are asked by the very same decoding code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgellm.models.protocol import LanguageModel, SourceModel, Step, answers_sources, with_hidden
from edgellm_exporters.graph.capture import check_model, signature_of
from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.bundle.encoder_info import ENCODER, EncoderInfo
from edgellm_runtime.session import Session
from edgellm_runtime.state import State

__all__ = ["TorchBackend", "encoder_info", "torch_session"]


class TorchBackend(HostBackend):
    """Runs steps eagerly, on the CPU; follows :class:`edgellm_runtime.backends.Backend`.

    Args:
        model: in evaluation mode, with weights in memory.
    """

    device = "PyTorch on the CPU"

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """What the model's encoder makes takes the place of the state's arrays."""
        assert isinstance(self._model, SourceModel)
        with torch.inference_mode():
            made = self._model.encode(torch.from_numpy(source), torch.from_numpy(lengths))
        for name, tensor in made.items():
            state.tensors[name] = tensor.contiguous().numpy()

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> NDArray[Any]:
        """One step; what the model gives takes the place of the state's arrays, without a copy."""
        return self._step(tokens, lengths, logit_positions, state)[0]

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The same with the last hidden states."""
        logits, hidden = self._step(tokens, lengths, logit_positions, state)
        assert hidden is not None
        return logits, hidden

    def _step(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        past = {name: torch.from_numpy(array) for name, array in state.tensors.items()}
        step = Step(*(torch.from_numpy(np.array(a)) for a in (state.lengths, lengths, logit_positions)))
        with torch.inference_mode():
            read = torch.from_numpy(np.ascontiguousarray(tokens))
            (logits, present), hidden = with_hidden(self._model, read, past, step)
        for name, tensor in present.items():
            state.tensors[name] = tensor.contiguous().numpy()
        return logits.numpy(), None if hidden is None else hidden.numpy()


def encoder_info(model: LanguageModel) -> EncoderInfo | None:
    """What a manifest says of a model's encoder; None where it has none."""
    if not answers_sources(model):
        return None
    config: Any = model.config
    return EncoderInfo(ENCODER, tuple(config.start_tokens), config.max_source)


def torch_session(model: LanguageModel, *, max_context: int | None = None) -> Session:
    """Steps of a PyTorch model, as the runtime takes those of a bundle.

    Args:
        model: follows :class:`edgellm.models.protocol.LanguageModel`; it is put in evaluation mode.
        max_context: the most tokens a row may hold; None for the model's own.

    Raises:
        CaptureError: it follows no such protocol, or its weights are not finite.
    """
    check_model(model)
    assert isinstance(model, nn.Module)
    model.eval()
    return Session(
        TorchBackend(model), signature_of(model), max_context=max_context or model.config.max_context,
        ragged_chunks=True, vocab_size=model.config.vocab_size, encoder=encoder_info(model),
    )  # fmt: skip
