"""Batches of examples of unequal length: neighbours in length together, as many as a budget of tokens allows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from edgellm.errors import TrainingError
from edgellm.tasks.encode import Encoded
from edgellm.training.batches import Batch
from edgellm.training.distributed import World
from edgellm.training.options import TrainOptions

__all__ = ["ExampleBatches"]

_POOL = 4096  # examples that are sorted by length among themselves: less padding, and yet another order every epoch


class ExampleBatches:
    """A source of batches for the trainer; see :class:`edgellm.training.batches.Batches`.

    Every epoch reads every example once, in an order of its own.

    Args:
        train: to train on.
        validation: held out.
        vocab_size: tokens are below this.
        width: targets are below this.
    """

    def __init__(
        self, train: Sequence[Encoded], validation: Sequence[Encoded], *, vocab_size: int, width: int
    ) -> None:  # fmt: skip
        self._train, self._validation = train, validation
        self.vocab_size, self._width = vocab_size, width
        self._epochs: dict[tuple[int, int, int], list[npt.NDArray[np.int64]]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """As :attr:`Batches.fingerprint`."""
        digest = hashlib.sha256()
        for row in (*self._train, *self._validation):
            for array in row:
                digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def baseline(self) -> float:
        """As :attr:`Batches.baseline`, with frequencies smoothed by adding one to every count."""
        counts = np.ones(self._width)
        for row in self._train:
            np.add.at(counts, row.targets, row.weights)
        nats = np.log(counts.sum()) - np.log(counts)
        total = sum(float(row.weights @ nats[row.targets]) for row in self._validation)
        return total / max(1e-9, sum(float(row.weights.sum()) for row in self._validation))

    def check(self, options: TrainOptions) -> None:
        """As :meth:`Batches.check`."""
        for name, part in (("training", self._train), ("validation", self._validation)):
            if not part:
                raise TrainingError(f"no {name} example fits; raise the context, or give shorter examples")
        longest = max(row.size for row in (*self._train, *self._validation))
        if longest > options.batch_tokens:
            raise TrainingError(
                f"an example takes {longest} tokens, over batch_tokens {options.batch_tokens}; raise batch_tokens"
            )

    def train(self, options: TrainOptions, step: int, world: World) -> Sequence[Batch]:
        """The step's batches: those that come next in the epoch at hand."""
        first = step * options.accumulation * world.size + world.rank * options.accumulation
        return [self._batch(self._train, self._at(options, first + i), world) for i in range(options.accumulation)]

    def validation(self, options: TrainOptions, world: World) -> Iterator[Batch]:
        """At most ``eval_batches`` batches for each process, evenly spread over the lengths."""
        order = np.argsort([row.size for row in self._validation], kind="stable")
        batches = self._divided(self._validation, order, options.batch_tokens)
        count = min(len(batches), options.eval_batches * world.size)
        chosen = [batches[i * len(batches) // count] for i in range(count)]
        for rows in chosen[world.rank :: world.size]:
            yield self._batch(self._validation, rows, world)

    def _at(self, options: TrainOptions, number: int) -> npt.NDArray[np.int64]:
        """The rows of a batch, counted from the run's beginning."""
        epoch = 0
        while number >= len(batches := self._epoch(options.seed, epoch, options.batch_tokens)):
            number, epoch = number - len(batches), epoch + 1
        return batches[number]

    def _epoch(self, seed: int, epoch: int, budget: int) -> list[npt.NDArray[np.int64]]:
        key = (seed, epoch, budget)
        if key not in self._epochs:
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
            order = generator.permutation(len(self._train))
            lengths = np.array([row.size for row in self._train])
            batches = []
            for start in range(0, len(order), _POOL):
                pool = order[start : start + _POOL]
                batches += self._divided(self._train, pool[np.argsort(lengths[pool], kind="stable")], budget)
            self._epochs[key] = [batches[i] for i in generator.permutation(len(batches))]
        return self._epochs[key]

    @staticmethod
    def _divided(
        rows: Sequence[Encoded], order: npt.NDArray[np.int64], budget: int
    ) -> list[npt.NDArray[np.int64]]:  # fmt: skip
        """Rows, shortest first, into batches whose padded size keeps to a budget."""
        batches, begin, widest = [], 0, (0, 0)  # of the batch at hand, tokens of the longest row and source
        for end, number in enumerate(order):
            own = len(rows[number].inputs), len(rows[number].source)
            grown = max(widest[0], own[0]), max(widest[1], own[1])
            if end > begin and (end + 1 - begin) * sum(grown) > budget:
                batches.append(order[begin:end])
                begin, grown = end, own
            widest = grown
        if begin < len(order):
            batches.append(order[begin:])
        return batches

    @staticmethod
    def _batch(rows: Sequence[Encoded], chosen: npt.NDArray[np.int64], world: World) -> Batch:
        picked = [rows[i] for i in chosen]
        length = max(len(row.inputs) for row in picked)
        inputs, targets = np.zeros((2, len(picked), length), np.int64)
        weights = np.zeros((len(picked), length), np.float32)
        for i, row in enumerate(picked):
            inputs[i, : len(row.inputs)], targets[i, : len(row.inputs)] = row.inputs, row.targets
            weights[i, : len(row.inputs)] = row.weights
        arrays = [inputs, targets, weights]
        if longest := max(len(row.source) for row in picked):
            sources = np.zeros((len(picked), longest), np.int64)
            for into, row in zip(sources, picked, strict=True):
                into[: len(row.source)] = row.source
            arrays += [sources, np.array([len(row.source) for row in picked], np.int32)]
        return Batch(*(torch.from_numpy(a).to(world.device, non_blocking=True) for a in arrays))
