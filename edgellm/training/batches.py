"""What a step trains on. The trainer asks a source for batches and knows neither text nor tasks.

A source's batches are a pure function of (options, step, process), so that resuming needs no position in the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from edgellm.training.distributed import World
from edgellm.training.evaluation import unigram_entropy
from edgellm.training.options import TrainOptions
from edgellm.training.tokens import TokenData
from edgellm.training.windows import even_offsets, random_offsets, windows

__all__ = ["Batch", "Batches", "WindowBatches"]


@dataclass(frozen=True)
class Batch:
    """Some rows of one forward pass.

    Args:
        inputs: (rows, time) int64.
        targets: (rows, time) int64: what the logits at each position are to say.
        weights: (rows, time) float32, how much each position counts; None: every one alike.
        sources: (rows, source) int64, what the rows answer, padded at the end; None: they go on with nothing.
        source_lengths: (rows,) int32, how many tokens of each are valid.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    sources: Tensor | None = None
    source_lengths: Tensor | None = None

    @property
    def given(self) -> tuple[Tensor, ...]:
        """What :class:`edgellm.training.forward.Forward` takes."""
        if self.sources is None or self.source_lengths is None:
            return (self.inputs,)
        return self.inputs, self.sources, self.source_lengths

    @property
    def weight(self) -> float:
        """How much the batch counts in a mean over batches."""
        return float(len(self.inputs)) if self.weights is None else float(self.weights.sum())

    @property
    def tokens(self) -> int:
        """Tokens read, padding included."""
        return self.inputs.numel() + (0 if self.sources is None else self.sources.numel())


class Batches(Protocol):
    """Where batches come from."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data; a run resumes only with the same one. Empty: not checked."""
        ...

    @property
    def baseline(self) -> float:
        """Nats a target on the validation part, of knowing only how common each target is."""
        ...

    def check(self, options: TrainOptions) -> None:
        """Make sure that there is enough to train on.

        Raises:
            TrainingError: there is not.
        """
        ...

    def train(self, options: TrainOptions, step: int, world: World) -> Sequence[Batch]:
        """The batches of this process's part of an update: ``options.accumulation`` of them."""
        ...

    def validation(self, options: TrainOptions, world: World) -> Iterator[Batch]:
        """The same batches every time; this process's part of them."""
        ...


class WindowBatches:
    """Windows of equal length over a stream of tokens; the targets are the tokens that come next.

    Args:
        data: the stream.
    """

    def __init__(self, data: TokenData) -> None:
        self.data = data
        self.vocab_size, self.fingerprint = data.vocab_size, data.fingerprint
        self.baseline = unigram_entropy(data)

    def check(self, options: TrainOptions) -> None:
        """As :meth:`Batches.check`."""
        self.data.check(options.context)

    def train(self, options: TrainOptions, step: int, world: World) -> Sequence[Batch]:
        """Windows at random places."""
        count = options.batch_size * options.accumulation * world.size
        offsets = random_offsets(count, len(self.data.train), options.context, seed=options.seed, step=step)
        mine = offsets.reshape(world.size, options.accumulation, options.batch_size)[world.rank]
        return [Batch(*windows(self.data.train, chosen, options.context, world.device)) for chosen in mine]

    def validation(self, options: TrainOptions, world: World) -> Iterator[Batch]:
        """Evenly spread windows."""
        count = options.eval_batches * options.batch_size * options.accumulation * world.size
        starts = even_offsets(count, len(self.data.validation), options.context)[world.rank :: world.size]
        for first in range(0, len(starts), options.batch_size):
            chosen = starts[first : first + options.batch_size]
            yield Batch(*windows(self.data.validation, chosen, options.context, world.device))
