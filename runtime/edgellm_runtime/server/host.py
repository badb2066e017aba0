"""The models of a server, by name, within one limit of memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgellm_runtime.arguments import check_integer, shown
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.batching.scheduler import Scheduler
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.prefix_cache import PrefixCache
from edgellm_runtime.loading import device_of, load
from edgellm_runtime.model import Model
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.state.memory_need import memory_need
from edgellm_runtime.tasks.runner import TaskRunner

__all__ = ["Host", "Hosted", "open_host"]

_PREFIX_CACHE = 256 << 20
_LEAST_CACHE = 1 << 16  # bytes; less holds nothing


@dataclass(frozen=True)
class Hosted:
    """A model that is served.

    Args:
        name: what clients call it.
        model: which.
        scheduler: runs its requests; models of one bundle that differ in their adapter share it.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    model: Model
    scheduler: Scheduler
    created: int

    @property
    def task(self) -> TaskRunner | None:
        """What puts a text into the form that the model was trained to answer; None: texts are taken as they are."""
        if self.model.bundle.manifest.task is None or self.model.tokenizer is None:
            return None
        return self.model.task if self.model.task.asks_one_text else None

    @property
    def answers(self) -> bool:
        """Whether the model answers what it is given, as a translator does, and does not go on with it."""
        return self.task is not None or self.model.session.encoder is not None

    @property
    def fingerprint(self) -> str:
        """What OpenAI's clients are told of the backend: equal for equal bundles."""
        return f"fp_{self.model.bundle.fingerprint[:12]}"


class Host:
    """Models by name.

    Args:
        models: at least one.
    """

    def __init__(self, models: Sequence[Hosted]) -> None:
        self._models: Mapping[str, Hosted] = {hosted.name: hosted for hosted in models}

    def __iter__(self) -> Iterator[Hosted]:
        return iter(self._models.values())

    def find(self, name: str) -> Hosted:
        """A model by its name.

        Raises:
            ApiError: there is none.
        """
        if (found := self._models.get(name)) is None:
            known = ", ".join(self._models)
            raise ApiError(f"The model {shown(name)} does not exist; this server has {known}.", 404,
                           code="model_not_found", param="model")  # fmt: skip
        return found

    def close(self, *, drain: bool = False) -> None:
        """End the schedulers' threads."""
        for scheduler in {id(hosted.scheduler): hosted.scheduler for hosted in self}.values():
            scheduler.close(drain=drain)


def open_host(
    bundles: Mapping[str, Path], batch: BatchOptions, *, device: str = "auto", threads: int | None = None,
    max_memory: int | None = None, prefix_cache: int | None = None,
) -> Host:  # fmt: skip
    """Load bundles.

    Args:
        bundles: by the names that they are to have.
        batch: how each model's requests share it.
        device: as for :func:`edgellm_runtime.load`.
        threads: likewise.
        max_memory: bytes that weights and states of all may take, as predicted; what weights leave is divided evenly.
        prefix_cache: bytes, among those, for what prompts begin with; 0: nothing is kept; None: 256 MiB, or a quarter
            of what weights leave if that is less.

    Raises:
        OptionError: they do not fit.
        BundleError: a bundle cannot be used.
    """
    cached = _PREFIX_CACHE if prefix_cache is None else check_integer("prefix_cache", prefix_cache, 0)
    if max_memory is not None:
        left = _left(bundles, device, max_memory)
        cached = min(cached, left // 4) if prefix_cache is None else cached
        if (own := (left - cached) // len(bundles)) <= 0:
            raise OptionError(
                f"prefix_cache is {cached:,} bytes, but of max_memory weights leave {left:,}; make it smaller"
            )
        batch = replace(batch, state_bytes=own)
    cache = PrefixCache(cached) if cached >= _LEAST_CACHE and not batch.exact else None
    hosted = []
    for name, path in bundles.items():
        model = load(path, device=device, threads=threads, prefix_cache=cache)
        scheduler = model.scheduler(
            rows=batch.rows, queue=batch.queue, piece=batch.piece, exact=batch.exact, state_bytes=batch.state_bytes
        )
        views = {name: model, **{f"{name}:{adapter}": model.with_adapter(adapter) for adapter in model.adapters}}
        hosted += [Hosted(called, view, scheduler, int(time.time())) for called, view in views.items()]
    return Host(hosted)


def _left(bundles: Mapping[str, Path], device: str, most: int) -> int:
    """What weights leave."""
    weights = {}
    for name, path in bundles.items():
        bundle = Bundle(path, checksums=False)
        weights[name] = memory_need(bundle.manifest, device_of(bundle, device), 1).weights
    left = most - sum(weights.values())
    if left <= 0:
        each = ", ".join(f"{name} {size:,}" for name, size in weights.items())
        raise OptionError(
            f"max_memory is {most:,} bytes, but weights take {sum(weights.values()):,} ({each}); give it more, or "
            "serve fewer or smaller bundles"
        )
    return left
