"""One layer's codes learned against what the float layer gives, by their gradients (Adam).

The measure is each token's squared error over its squared length: the next norm divides by the latter, and a few
tokens have outputs that are larger by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgellm_exporters.quantize.tuning.chosen import CodedWeight
from edgellm_exporters.quantize.tuning.latent import LatentWeight
from edgellm_exporters.quantize.tuning.layer_stream import GROUP, LayerStream, hidden_of

__all__ = ["LayerResult", "error_on", "tuned_layer"]

# How far all steps together go at most: a latent float, in codes, and a scale's factor. With more, errors on text that
# was held back fall less.
_REACH, _SCALE_REACH = 0.15, 0.06
_FEW = 40  # steps: fewer do not go as far, for one step must not carry a latent float over a border by chance


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer.

    Args:
        coded: its weights' codes, by its own names for them.
        before: the error on held-back windows with the codes that were there.
        after: with those that were learned.
        steps: how many were made.
    """

    coded: Mapping[str, CodedWeight]
    before: float
    after: float
    steps: int

    @property
    def better(self) -> bool:
        """Whether what was learned holds on text that it was not learned from."""
        return self.after < self.before


def tuned_layer(
    stream: LayerStream, path: str, targets: Tensor, floats: Mapping[str, Tensor], coded: Mapping[str, CodedWeight],
    *, learn: int, steps: Callable[[int], int], generator: torch.Generator,
) -> LayerResult:  # fmt: skip
    """Learn the codes of the layer that a stream is at.

    Args:
        stream: of the quantized model; its windows are learned from, but for the last ones.
        path: of the layer, for messages.
        targets: what the float layer gives, (windows, time, width).
        floats: the layer's float parameters, by its own names for them.
        coded: codes of some of them.
        learn: how many of the windows are learned from; the others are held back.
        steps: told how many were made, says how many there are to be.
        generator: of the order of minibatches.
    """
    latents = {
        name: LatentWeight(floats[name], c.codes, c.scheme, c.column, c.row, move_codes=True)
        for name, c in coded.items()
    }
    held = range(learn, len(targets))
    first = error_on(stream, path, targets, {**floats, **_numbers(coded)}, held)
    factors, codes = ([t for latent in latents.values() for t in latent.learned[i : i + 1]] for i in (0, 1))
    groups = [{"params": factors, "reach": _SCALE_REACH}, {"params": codes, "reach": _REACH}]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-12)
    done, batches = 0, _batches(learn, generator)
    while done < (total := steps(done)):
        for group in optimizer.param_groups:
            group["lr"] = 2 * group["reach"] / max(total, _FEW) * (1 - done / total)
        windows = next(batches)
        given = stream.run(stream.call(windows), {**floats, **{name: latent() for name, latent in latents.items()}})
        optimizer.zero_grad()
        _error(hidden_of(given, path), targets[windows]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for latent in latents.values():
            latent.keep_in_range()
        done += 1
    found = {name: coded[name].with_codes(latent.codes()) for name, latent in latents.items()}
    return LayerResult(found, first, error_on(stream, path, targets, {**floats, **_numbers(found)}, held), done)


def _numbers(coded: Mapping[str, CodedWeight]) -> dict[str, Tensor]:
    return {name: c.rows(0, len(c.row)) for name, c in coded.items()}


def _batches(learn: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Groups of windows without end, each window once before any comes again."""
    while True:
        order = torch.randperm(learn, generator=generator).tolist()
        yield from (order[i : i + GROUP] for i in range(0, learn, GROUP))


@torch.no_grad()
def error_on(
    stream: LayerStream, path: str, targets: Tensor, parameters: Mapping[str, Tensor], windows: Sequence[int]
) -> float:
    """The mean error of a layer's outputs over windows, a multiple of :data:`GROUP` of them."""
    errors = [
        _error(hidden_of(stream.run(stream.call(some), parameters), path), targets[list(some)])
        for some in (windows[i : i + GROUP] for i in range(0, len(windows), GROUP))
    ]
    return float(torch.cat(errors).mean())


def _error(given: Tensor, wanted: Tensor) -> Tensor:
    """Each token's squared distance over its squared length, (batch, time)."""
    return (given - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
