"""Scales and vectors learned end to end, by the float model's distributions of the next token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from edgellm.models.protocol import read_rows
from edgellm.streaming import Weights
from edgellm_exporters.quantize.tuning.chosen import ChosenWeights, CodedWeight
from edgellm_exporters.quantize.tuning.latent import LatentWeight

__all__ = ["Distilled", "distilled"]

Wanted = Callable[[Sequence[int]], Tensor]
GROUP = 4  # windows of a step
_RATE = 1e-3


@dataclass(frozen=True)
class Distilled:
    """What became of all scales and vectors.

    Args:
        coded: the weights, by each name that the model has for them.
        vectors: factors on the model's vectors.
        before: the mean KL divergence on held-back windows with the codes that were there.
        after: with those that were learned.
        steps: how many were made.
    """

    coded: Mapping[str, CodedWeight]
    vectors: Mapping[str, Tensor]
    before: float
    after: float
    steps: int


def distilled(
    shell: nn.Module, weights: Weights, coded: Mapping[str, CodedWeight], vectors: Collection[str], tokens: Tensor,
    wanted: Wanted, *, learn: int, steps: Callable[[int], int], generator: torch.Generator,
) -> Distilled:  # fmt: skip
    """Learn the scales of all weights at once, and the gains of norms with them.

    Args:
        shell: the model, its parameters on the meta device.
        weights: the float ones.
        coded: codes of some of them, by each name that the model has for them.
        vectors: names of the model's vectors that may change.
        tokens: (windows, time).
        wanted: the float model's logits for some of the windows.
        learn: how many of the windows are learned from; the others are held back.
        steps: told how many were made, says how many there are to be.
        generator: of the order of minibatches.
    """
    model = _Model(shell, weights, coded, vectors)
    held = range(learn, len(tokens))
    before = model.divergence(tokens, wanted, held)
    optimizer = torch.optim.Adam(model.learned, lr=_RATE, betas=(0.9, 0.99))
    done, order = 0, list[int]()
    while done < (total := steps(done)):
        if len(order) < GROUP:
            order = torch.randperm(learn, generator=generator).tolist()
        windows, order = order[:GROUP], order[GROUP:]
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - done / total)
        optimizer.zero_grad()
        model.kl(tokens, wanted, windows).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done += 1
    model.settle()
    return Distilled(model.coded, model.vectors, before, model.divergence(tokens, wanted, held), done)


class _Model:
    """The quantized model with its scales and vectors to learn."""

    def __init__(
        self, shell: nn.Module, weights: Weights, coded: Mapping[str, CodedWeight], vectors: Collection[str]
    ) -> None:
        self._reader, self._weights, self.coded = _Reader(shell), ChosenWeights(weights, coded), coded
        self._names = [name for name, _ in shell.named_parameters()]
        self._latents = {
            name: LatentWeight(None, c.codes, c.scheme, c.column, c.row, move_codes=False)
            for name, c in coded.items() if name in self._names and c.tunable
        }  # fmt: skip
        self.vectors = {
            name: torch.ones(p.shape, requires_grad=True) for name, p in shell.named_parameters() if name in vectors
        }

    @property
    def learned(self) -> list[Tensor]:
        """The scales' factors, and the vectors'."""
        return [t for latent in self._latents.values() for t in latent.learned] + list(self.vectors.values())

    def kl(self, tokens: Tensor, wanted: Wanted, windows: Sequence[int]) -> Tensor:
        """From the float model's distributions, nats, (batch, time)."""
        given, theirs = (F.log_softmax(x, -1) for x in (self._logits(tokens[list(windows)]), wanted(windows)))
        return F.kl_div(given, theirs, reduction="none", log_target=True).sum(-1)

    def _logits(self, tokens: Tensor) -> Tensor:
        parameters = {f"model.{name}": self._parameter(name) for name in self._names}
        logits: Tensor = functional_call(self._reader, parameters, (tokens,))
        return logits

    def _parameter(self, name: str) -> Tensor:
        if name in self._latents:
            return self._latents[name]()
        found = self._weights.read(name).detach()
        return found * self.vectors[name] if name in self.vectors else found

    @torch.no_grad()
    def divergence(self, tokens: Tensor, wanted: Wanted, windows: Sequence[int]) -> float:
        """The mean over some windows, a multiple of :data:`GROUP` of them."""
        found = [self.kl(tokens, wanted, windows[i : i + GROUP]) for i in range(0, len(windows), GROUP)]
        return float(torch.cat(found).mean())

    def settle(self) -> None:
        """End learning: from now on the numbers are those that a file holds."""
        now = {self.coded[name].name: latent.codes() for name, latent in self._latents.items()}
        self.coded = {name: c.with_codes(now[c.name]) if c.name in now else c for name, c in self.coded.items()}
        self._weights, self._latents = ChosenWeights(self._weights.weights, self.coded), {}
        self.vectors = {name: factor.detach() for name, factor in self.vectors.items()}


class _Reader(nn.Module):
    """Reads whole rows; tied parameters stay tied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) to logits."""
        return read_rows(self.model, tokens)[0]
