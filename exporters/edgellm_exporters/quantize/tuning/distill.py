"""Codes, scales and vectors learned end to end, by the float model's distributions of the next token.

Beside the codes, in memory are what moves and one copy of each weight, made of its codes once a step: gradients of
weights are used up where they arise, and layers are computed again for the gradient, of their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgellm.models.protocol import read_rows
from edgellm.streaming import Weights
from edgellm_exporters.quantize.tuning.chosen import ChosenWeights, CodedWeight
from edgellm_exporters.quantize.tuning.divergence import divergence
from edgellm_exporters.quantize.tuning.learned import LearnedWeight, product, whole
from edgellm_exporters.quantize.tuning.reading import Reading, Source, fast_dtype

__all__ = ["GROUP", "Distilled", "distilled"]

GROUP = 4  # windows of a step
# How far all steps together go at most: a float behind a code, in codes, and factors. With more, what is chance in each
# step's few words adds up: seven times as far, codes that layers were tuned to got worse on text that was held back.
_CODES, _SCALES, _VECTORS = 0.1, 0.015, 0.015
_FEW = 50  # steps: fewer do not go as far
_WARM = 8  # steps that come to the rates


@dataclass(frozen=True)
class Distilled:
    """What became of all codes, scales and vectors.

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
    teacher: Source, *, paths: Sequence[str], learn: int, steps: Callable[[int], int], generator: torch.Generator,
) -> Distilled:  # fmt: skip
    """Learn the codes and scales of all weights that are tunable at once, and some vectors with them.

    Args:
        shell: the model, its parameters on the meta device.
        weights: the float ones.
        coded: codes of some of them, by each name that the model has for them.
        vectors: names of the model's vectors that may change.
        tokens: (windows, time).
        teacher: the float weights as the teacher reads them.
        paths: of the layers, of which only inputs are kept for the gradient.
        learn: how many of the windows are learned from; the others are held back.
        steps: told how many were made, says how many there are to be.
        generator: of the order of minibatches.
    """
    model = _Model(shell, weights, coded, vectors, paths)
    held = tokens[learn:]
    before = model.divergence(held, teacher)
    if steps(0):
        model.begin()
    optimizer = torch.optim.Adam(model.vectors.values(), lr=0.0, betas=(0.9, 0.99)) if model.vectors else None
    done, order = 0, list[int]()
    while done < (total := steps(done)):
        if len(order) < GROUP:
            order = torch.randperm(learn, generator=generator).tolist()
        windows, order = order[:GROUP], order[GROUP:]
        rate = min(1.0, (done + 1) / _WARM) * (1 + math.cos(math.pi * done / total)) / max(total, _FEW)
        model.learn(tokens[windows], teacher)
        model.step(rate)
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = _VECTORS * rate
            optimizer.step()
            optimizer.zero_grad()
        done += 1
    model.settle()
    return Distilled(model.coded, model.vectors, before, model.divergence(held, teacher), done)


class _Model:
    """The quantized model with its codes, scales and vectors to learn; follows :class:`Source`."""

    def __init__(
        self, shell: nn.Module, weights: Weights, coded: Mapping[str, CodedWeight], vectors: Collection[str],
        paths: Sequence[str],
    ) -> None:  # fmt: skip
        self._shell, self._weights, self.coded, self._paths = shell, weights, coded, paths
        self._names = {id(p): name for name, p in shell.named_parameters()}
        self._learned: dict[str, LearnedWeight] = {}
        self._small: dict[str, Tensor] = {}  # vectors, which are read once
        self._chosen, self._dtype = ChosenWeights(weights, coded), fast_dtype()
        self._anchor = torch.zeros((), requires_grad=True)
        self.vectors = {
            name: torch.ones(p.shape, requires_grad=True) for name, p in shell.named_parameters() if name in vectors
        }

    def begin(self) -> None:
        """Make room for what is learned."""
        for name in self._names.values():
            c = self.coded.get(name)
            if c is not None and c.tunable:
                self._learned[name] = LearnedWeight(c.codes, c.scheme, c.column, c.row)
                weight = self._weights.read(name).detach().float()
                self._learned[name].begin_at(weight * c.column * c.row[:, None])

    def learn(self, tokens: Tensor, teacher: Source) -> None:
        """Find out the gradients of some windows; those of matrices are used up at once."""
        wanted = self._wanted(tokens, teacher)
        with Reading(self), _checkpointed(self._shell, self._paths, lambda: Reading(self)):
            loss = divergence(read_rows(self._shell, tokens)[0], wanted).mean()
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate: float) -> None:
        """Move codes and scales by a share of how far they go."""
        for weight in self._learned.values():
            weight.step(codes=_CODES * rate, scales=_SCALES * rate)

    @torch.no_grad()
    def _wanted(self, tokens: Tensor, teacher: Source) -> Tensor:
        with Reading(teacher):
            return read_rows(self._shell, tokens)[0]

    @torch.no_grad()
    def divergence(self, tokens: Tensor, teacher: Source) -> float:
        """The mean over some windows, (windows, time)."""
        found = []
        for some in torch.split(tokens, GROUP):
            wanted = self._wanted(some, teacher)
            with Reading(self):
                found.append(divergence(read_rows(self._shell, some)[0], wanted))
        return float(torch.cat(found).mean())

    def settle(self) -> None:
        """End learning: from now on the numbers are those that a file holds."""
        now = {self.coded[name].name: learned.codes() for name, learned in self._learned.items()}
        self.coded = {name: c.with_codes(now[c.name]) if c.name in now else c for name, c in self.coded.items()}
        self._chosen, self._learned = ChosenWeights(self._weights, self.coded), {}
        self.vectors = {name: factor.detach() for name, factor in self.vectors.items()}

    def name_of(self, value: Any) -> str | None:
        """See :class:`Source`."""
        return self._names.get(id(value))

    def product(self, x: Tensor, name: str) -> Tensor:
        """See :class:`Source`."""
        if name in self._learned:
            return product(x, self._anchor, self._learned[name], self._dtype)
        return F.linear(x, self.read(name))

    def rows(self, name: str, some: Tensor) -> Tensor:
        """See :class:`Source`; a table's rows are looked up without a gradient."""
        if name in self._learned:
            return self._learned[name].rows(some)
        return torch.cat([self._chosen.rows(name, i, i + 1) for i in some.tolist()]).detach()

    def read(self, name: str) -> Tensor:
        """See :class:`Source`."""
        if name in self._learned:
            return whole(self._anchor, self._learned[name])
        found = self._small.get(name)
        if found is None:
            found = self._chosen.read(name).detach()
            if found.dim() < 2:
                self._small[name] = found
        return found * self.vectors[name] if name in self.vectors else found


@contextmanager
def _checkpointed(
    shell: nn.Module, paths: Sequence[str], reading: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Have layers computed again for the gradient, of their inputs."""
    again = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), reading())
    )
    with ExitStack() as undo:
        for path in paths:
            module = shell.get_submodule(path)
            module.forward = partial(again, module.forward)
            undo.callback(delattr, module, "forward")
        yield
