"""Tuned rounding of a whole plan: layer after layer, then all layers at once, for as long as is given."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgellm.streaming import Weights
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.smooth import scale_vectors, vectors_of
from edgellm_exporters.quantize.tuning import layer_stream
from edgellm_exporters.quantize.tuning.chosen import ChosenWeights, CodedWeight, RememberedRows, coded_weights
from edgellm_exporters.quantize.tuning.distill import distilled
from edgellm_exporters.quantize.tuning.held import HeldWeights
from edgellm_exporters.quantize.tuning.layer import tuned_layer
from edgellm_exporters.quantize.tuning.layer_stream import LayerStream, layers_called, shell_of
from edgellm_exporters.quantize.tuning.own_words import has_words, own_words
from edgellm_exporters.quantize.tuning.reading import fast_dtype, fast_products
from edgellm_exporters.quantize.tuning.schedule import LAYERS_SHARE, WRITING_SHARE, Schedule, schedule_of
from edgellm_exporters.quantize.tuning.store import ROOM, FinishedLayers, work_digest

__all__ = ["MIN_TUNING_TOKENS", "MOST_TUNING_TOKENS", "Tuning", "tuned"]

WINDOW = 128  # tokens
MIN_TUNING_TOKENS, MOST_TUNING_TOKENS = 6144, 67_584
_MOST_HELD = 16  # windows that are held back, at most
_VERSION = 4  # of the method: layers that another one finished are not taken over
_PASSES = 1.5  # what follows a layer's steps, in times that the float layer takes to read all
_HELD = 9  # one window of so many is held back
_TIMED = (2, 8, 32, 128, 512)  # steps after which it is looked how long the last ones took; the first read weights, too
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How codes are to be tuned.

    Args:
        minutes: that it may take, at most, besides what GPTQ takes.
        tokens: text to learn from, of which :data:`MOST_TUNING_TOKENS` are read; their end is held back and only judged
            on.
        seed: of the order in which text is read.
        own_tokens: that the model makes up itself, to learn from besides; 0: none; None: more for more minutes.
        steps: of each layer, at most, and fewer where the minutes are too few; None: more for more minutes.
        distilling_steps: of all layers together, likewise.
        directory: where finished layers are kept until the export is done, for a run that is stopped; None: nowhere.
        clock: seconds.

    Raises:
        QuantizeError: too little text, or no time.
    """

    minutes: float
    tokens: Sequence[int] = field(repr=False)
    seed: int = 0
    own_tokens: int | None = None
    steps: int | None = None
    distilling_steps: int = 600
    directory: Path | None = None
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise QuantizeError(f"tuning for {self.minutes} minutes is not possible; give a positive number")
        if len(self.tokens) < MIN_TUNING_TOKENS:
            raise QuantizeError(
                f"the calibration text has {len(self.tokens)} tokens, and tuning needs {MIN_TUNING_TOKENS}; give a "
                "longer text, or leave --tune out"
            )

    @property
    def schedule(self) -> Schedule:
        """How much is learned, at most."""
        of_minutes = schedule_of(self.minutes)
        return dataclasses.replace(
            of_minutes,
            steps=of_minutes.steps if self.steps is None else self.steps,
            own_tokens=of_minutes.own_tokens if self.own_tokens is None else self.own_tokens,
        )


def tuned(
    plan: Plan, model: nn.Module, weights: Weights, paths: Sequence[str], graphs: Sequence[ir.Model], tuning: Tuning,
    progress: Progress = lambda what, share: None,
) -> Plan:  # fmt: skip
    """A plan with the same formats and codes that are nearer to what the float model computes; graphs get its vectors.

    A layer whose error on held-back text is no smaller than with the plan's own codes keeps those. Given the minutes
    that it takes, the outcome depends on the seed alone.

    Args:
        plan: with codes to begin with, those of GPTQ best.
        model: in eval mode; its parameters may be on the meta device, and it is left as it was.
        weights: where they are read.
        paths: of its layers.
        graphs: that the plan is for, of canonical ops; their norms' gains are changed with the scales.
        tuning: how.
        progress: told what is done, and how much of it.

    Raises:
        QuantizeError: nothing in the plan can be tuned, or the model is no stack of layers.
    """
    if plan.kept:
        raise QuantizeError("codes that a checkpoint has of its own are kept as they are; leave --tune out with keep")
    coded = coded_weights(model, weights, plan) if plan.schemes else {}
    if not any(one.tunable for one in coded.values()):
        raise QuantizeError("no weight is quantized in blocks without shifts, which is what can be tuned")
    shell = shell_of(model)
    tokens, learn = _windows(tuning.tokens, model)
    order = layers_called(shell, weights, tokens[: layer_stream.GROUP], paths)
    with fast_products(), _Work(tuning, coded, order) as work:
        run = _Run(shell, weights, coded, tokens, learn, order, work, tuning, progress)
        run.tune_layers()
        run.distill(vectors_of(graphs, {name: p.shape for name, p in model.named_parameters()}))
    found = _with_codes(plan, run.coded, run.told())
    found.vectors = {name: factor.numpy() for name, factor in run.vectors.items()}
    scale_vectors(graphs, found.vectors)
    return found


class _Work:
    """The directory of one run: finished layers, where they are kept, and room for what layers compute.

    Args:
        tuning: names the directory.
        coded: the codes to begin with.
        order: the layers.
    """

    def __init__(self, tuning: Tuning, coded: Mapping[str, CodedWeight], order: Sequence[str]) -> None:
        settings = {
            "version": _VERSION, "seed": tuning.seed, "schedule": dataclasses.asdict(tuning.schedule),
            "order": list(order), "dtype": str(fast_dtype()),
            "tokens": hashlib.sha256(np.asarray(tuning.tokens, dtype=np.int64).tobytes()).hexdigest(),
        }  # fmt: skip
        self.finished = None
        if tuning.directory is not None:
            self.finished = FinishedLayers(tuning.directory, work_digest(coded, settings))
        self._room = tempfile.TemporaryDirectory(prefix=ROOM, dir=tuning.directory)
        self.room = Path(self._room.name)

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.cleanup()


class _Run:
    """One tuning, from the first layer to the last scale."""

    def __init__(
        self, shell: nn.Module, weights: Weights, coded: Mapping[str, CodedWeight], tokens: Tensor, learn: int,
        order: Sequence[str], work: _Work, tuning: Tuning, progress: Progress,
    ) -> None:  # fmt: skip
        self.coded = dict(coded)
        self._shell, self._weights, self._tokens, self._learn, self._order = shell, weights, tokens, learn, order
        self._work, self._tuning, self._progress = work, tuning, progress
        self._begin = tuning.clock()
        self._chosen = ChosenWeights(weights, self.coded)
        self._own = self._own_words(learn)
        some = _evenly(
            self._own, tokens[:learn], tuning.schedule.layer_windows // layer_stream.GROUP * layer_stream.GROUP
        )
        self._layer_learn = len(some)
        some = torch.cat([some, tokens[learn:]])
        self._floats = LayerStream(shell, RememberedRows(weights), some, order, work.room / "float")
        self._quantized = LayerStream(shell, RememberedRows(self._chosen), some, order, work.room / "quantized")
        self._layers: dict[str, dict[str, Any]] = {}
        self._distilled: dict[str, Any] = {}
        self.vectors: Mapping[str, Tensor] = {}

    def tune_layers(self) -> None:
        """All layers, first to last."""
        said = ""
        for number, path in enumerate(self._order):
            self._progress(f"tuning layers · {number + 1} of {len(self._order)}{said}", number / len(self._order))
            told = self._layer(number, path)
            if told:
                self._layers[path] = told
                said = f", error {told['after']:.3g} after {told['before']:.3g}" if told["after"] is not None else ""

    def _layer(self, number: int, path: str) -> dict[str, Any]:
        """Pass one layer with both streams, its codes tuned in between."""
        start = self._tuning.clock()
        floats = self._floats.parameters(self._weights)
        self._floats.advance(floats)
        passing = self._tuning.clock() - start
        own = {name: self.coded[f"{path}.{name}"] for name in floats if f"{path}.{name}" in self.coded}
        own = {name: one for name, one in own.items() if one.tunable}
        found = self._work.finished.load(path, own) if own and self._work.finished is not None else None
        if found is None and own:
            share = (self._begin + 60 * LAYERS_SHARE * self._tuning.minutes - start) / (len(self._order) - number)
            pace = _Pace(self._tuning, start + share - _PASSES * passing, self._tuning.schedule.steps)
            result = tuned_layer(
                self._quantized, path, self._floats.passed_outputs(), floats, own, learn=self._layer_learn, steps=pace,
                generator=self._generator(number),
            )  # fmt: skip
            told = _told(path, result.before, result.after, result.steps)
            found = (dict(result.coded) if result.better else own), told
            if self._work.finished is not None:
                self._work.finished.save(path, *found)
        coded, told = found or ({}, {})
        names = {one.name: one for one in coded.values()}
        self.coded |= {name: names[one.name] for name, one in self.coded.items() if one.name in names}
        self._chosen.coded = self.coded
        self._quantized.advance(self._quantized.parameters(self._chosen))
        return told

    def distill(self, vectors: Collection[str]) -> None:
        """All codes and scales and some vectors at once, in the time that is left."""
        teacher, own = HeldWeights(self._shell, self._weights), self._own
        tokens = torch.cat([own, self._tokens])
        pace = _Pace(self._tuning, self._begin + 60 * self._tuning.minutes, self._tuning.distilling_steps)

        def steps(done: int) -> int:
            total = pace(done)
            self._progress(f"tuning all layers together{f' · {total} steps' if done else ''}", done / max(total, 1))
            return total

        found = distilled(
            self._shell, self._weights, self.coded, vectors, tokens, teacher, paths=self._order,
            learn=len(own) + self._learn, steps=steps, generator=self._generator(len(self._order)),
        )  # fmt: skip
        self._distilled = _told("the model", found.before, found.after, found.steps)
        if not self._distilled["kept"]:
            self.coded, self.vectors = dict(found.coded), found.vectors

    def _own_words(self, learn: int) -> Tensor:
        """Windows of text that the float model makes up, (windows, time), no more than of the other and than there is
        time for; none where it cannot.
        """
        time, group = self._tokens.shape[1], layer_stream.GROUP
        rows = min(self._tuning.schedule.own_tokens // time, learn) // group * group if has_words(self._shell) else 0
        if not rows:
            return self._tokens[:0]
        held, finished = HeldWeights(self._shell, self._weights), self._work.finished
        found = finished.load_words(rows, time) if finished is not None else None
        if found is None:
            tell = partial(self._progress, "writing text to learn from")
            until = self._begin + 60 * WRITING_SHARE * self._tuning.minutes
            found = own_words(
                self._shell, held, rows, time, self._generator(len(self._order) + 1), tell,
                enough=lambda: self._tuning.clock() >= until,
            )  # fmt: skip
            if finished is not None:
                finished.save_words(found)
        return found

    def told(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "seed": self._tuning.seed, "tokens": self._tokens[: self._learn].numel(), "own_tokens": self._own.numel(),
            "layers": self._layers, "together": self._distilled,
        }  # fmt: skip

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self._tuning.seed + number)


def _evenly(own: Tensor, given: Tensor, most: int) -> Tensor:
    """So many windows, half of each kind as far as there are."""
    first = own[: max(most // 2, most - len(given))]
    return torch.cat([first, given[: most - len(first)]])


def _told(what: str, before: float, after: float, steps: int) -> dict[str, Any]:
    """What the manifest says of a layer, or of all at once; whether it keeps the numbers from before."""
    if not math.isfinite(before):
        raise QuantizeError(f"{what} gives NaN or infinities on real text; check the checkpoint")
    shown = after if math.isfinite(after) else None
    return {"before": before, "after": shown, "steps": steps, "kept": not after < before}


class _Pace:
    """How many steps there is time for, counted again after each of :data:`_TIMED`.

    Args:
        tuning: has the clock.
        until: when to be done.
        most: steps.
    """

    def __init__(self, tuning: Tuning, until: float, most: int) -> None:
        self._clock, self._until, self._total = tuning.clock, until, most
        self._most, self._since, self._seen = most, tuning.clock(), 0
        if self._since >= until:
            self._total = 0

    def __call__(self, done: int) -> int:
        if done in _TIMED and done > self._seen:
            now = self._clock()
            each = max(now - self._since, 1e-9) / (done - self._seen)
            self._total = min(self._most, done + max(int((self._until - now) / each), 0))
            self._since, self._seen = now, done
        return self._total


def _windows(tokens: Sequence[int], model: Any) -> tuple[Tensor, int]:
    """Windows (count, time), and how many of them are learned from."""
    time = min(WINDOW, model.config.max_context)
    group = layer_stream.GROUP
    count = min(len(tokens), MOST_TUNING_TOKENS) // time // group * group
    held = min(max(1, count // group // _HELD) * group, _MOST_HELD)
    return torch.tensor(list(tokens[: count * time])).view(count, time), count - held


def _with_codes(plan: Plan, coded: Mapping[str, CodedWeight], told: Mapping[str, Any]) -> Plan:
    found = {one.name: one.codes for one in coded.values()}
    others = {name: plan.chosen[name] for name in plan.chosen if name not in found}
    return dataclasses.replace(plan, chosen={**others, **found}, tuned=told, _last=None)
