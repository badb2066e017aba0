"""What rounding a weight costs, by trying it: for the few weights that no gradient tells of, recurrent ones mostly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.streaming import Weights, resident
from edgellm_exporters.auto.formats import FormatChoices
from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest

__all__ = ["tried"]


@torch.no_grad()
def tried(
    model: nn.Module, weights: Weights, candidates: Sequence[FormatChoices], window: Sequence[int],
    progress: Callable[[float], None],
) -> dict[str, dict[Scheme, float]]:  # fmt: skip
    """Nats a token that each format of each weight costs, with one weight rounded at a time.

    Args:
        model: in eval mode; may be on the meta device.
        weights: where its parameters are read from.
        candidates: weights and their formats.
        window: token ids to run.
        progress: told the share that is done.
    """
    tokens = torch.tensor([list(window)])

    def logs() -> Tensor:
        found: Tensor = model(tokens)[0][0].double().log_softmax(-1)
        return found

    with resident(model, weights):
        before = logs()
    found: dict[str, dict[Scheme, float]] = {}
    for number, weight in enumerate(candidates):
        costs = found[weight.name] = {}
        for scheme in weight.schemes:
            values = weights.read(weight.name)
            rounded = round_to_nearest(values.float().numpy(), scheme).dequantize()
            with _replaced(model, weights, weight.name, torch.from_numpy(rounded).to(values.dtype)):
                costs[scheme] = max(0.0, float((before.exp() * (before - logs())).sum(-1).mean()))
        progress((number + 1) / len(candidates))
    return found


class _Changed:
    """Weights, one of which is another; follows :class:`edgellm.streaming.Weights`."""

    def __init__(self, weights: Weights, name: str, value: Tensor) -> None:
        self._weights, self._name, self._value = weights, name, value

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._value if name == self._name else self._weights.read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        return self._value[start:stop] if name == self._name else self._weights.rows(name, start, stop)


@contextmanager
def _replaced(model: nn.Module, weights: Weights, name: str, value: Tensor) -> Iterator[None]:
    """Let a model run with another value for one parameter."""
    parameter: Any = dict(model.named_parameters(remove_duplicate=False))[name]
    if parameter.is_meta:
        with resident(model, _Changed(weights, name, value)):
            yield
        return
    kept = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = kept
