"""The options of a run: those of the call, and each row's own where they differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_list, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.answer import FinishReason
from edgellm_runtime.generation.options import GenerationOptions, OptionKeywords
from edgellm_runtime.generation.sampling import Sampler

__all__ = ["Choosing", "RowOptions", "own_options"]

_OF_THE_CALL = ("adapter", "progress", "draft")  # which are one step's or one prompt's affair


class Choosing(Protocol):
    """Chooses tokens of rows; :class:`~edgellm_runtime.generation.sampling.Sampler` does."""

    @property
    def deciding(self) -> int | None:
        """See :class:`Sampler`."""

    def observe(self, row: int, prompt: Sequence[int], answer_from: int | None = None) -> None:
        """See :class:`Sampler`."""

    def __call__(self, logits: NDArray[np.float32], rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """See :class:`Sampler`."""

    def among(
        self, ids: NDArray[np.int64], logits: NDArray[np.float32], rows: Sequence[int],
        everything: Callable[[], NDArray[np.float32]],
    ) -> NDArray[np.int64]:  # fmt: skip
        """See :class:`Sampler`."""


class _RowSamplers:
    """A sampler for each row. Follows :class:`Choosing`.

    Args:
        samplers: each of one row.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self._samplers = samplers

    @property
    def deciding(self) -> int | None:
        """See :class:`Choosing`."""
        counts = [sampler.deciding for sampler in self._samplers]
        return None if None in counts else max(count for count in counts if count is not None)

    def observe(self, row: int, prompt: Sequence[int], answer_from: int | None = None) -> None:
        """See :class:`Choosing`."""
        self._samplers[row].observe(0, prompt, answer_from)

    def __call__(self, logits: NDArray[np.float32], rows: Sequence[int] | None = None) -> NDArray[np.int64]:
        """See :class:`Choosing`."""
        indices = range(len(logits)) if rows is None else rows
        chosen = [self._samplers[row](x[None])[0] for row, x in zip(indices, logits, strict=True)]
        return np.array(chosen, dtype=np.int64)

    def among(
        self, ids: NDArray[np.int64], logits: NDArray[np.float32], rows: Sequence[int],
        everything: Callable[[], NDArray[np.float32]],
    ) -> NDArray[np.int64]:  # fmt: skip
        """See :class:`Choosing`."""
        chosen = []
        for at, row in enumerate(rows):
            sampler = self._samplers[row]
            some, values = ids[at : at + 1, : sampler.deciding], logits[at : at + 1, : sampler.deciding]
            chosen.append(sampler.among(some, values, [0], lambda at=at: everything()[at : at + 1])[0])  # type: ignore[misc]
        return np.array(chosen, dtype=np.int64)


class RowOptions:
    """Options of the rows of one run.

    Args:
        call: what the whole run goes by.
        rows: each row's; None: all are the call's.
    """

    def __init__(self, call: GenerationOptions, rows: Sequence[GenerationOptions] | None = None) -> None:
        self.call, self._rows = call, rows
        self._began = time.monotonic()

    def of(self, row: int) -> GenerationOptions:
        """A row's."""
        return self.call if self._rows is None else self._rows[row]

    def sampler(self, rows: int, vocab_size: int, ends: Callable[[int], Collection[int]]) -> Choosing:
        """What chooses.

        Args:
            rows: how many.
            vocab_size: length of a row of logits.
            ends: of a row, the tokens that end it.
        """
        if self._rows is None:
            return Sampler(self.call, rows=rows, vocab_size=vocab_size, ends=ends(0))
        own = [Sampler(o, rows=1, vocab_size=vocab_size, ends=ends(i)) for i, o in enumerate(self._rows)]
        return _RowSamplers(own)

    def ended(self, row: int) -> FinishReason | None:
        """Whether a row's own options end it here, from outside."""
        if self._rows is None:
            return None
        options = self._rows[row]
        if options.cancel is not None and options.cancel.is_set():
            return "cancelled"
        late = options.deadline is not None and time.monotonic() - self._began >= options.deadline
        return "deadline" if late else None


def own_options(
    given: Any, rows: int, common: OptionKeywords, checked: Callable[[OptionKeywords], GenerationOptions]
) -> list[GenerationOptions]:
    """Each row's options: the call's, with what it names itself in their place.

    Args:
        given: a mapping of options for each row.
        rows: how many there are.
        common: the call's.
        checked: makes options of keywords.

    Raises:
        OptionError: another number of mappings than of rows, something else, or what is the whole call's.
    """
    each = check_list("row_options", given, "dicts of options, one for each prompt", _check_mapping)
    if len(each) != rows:
        raise OptionError(f"row_options has {len(each)} entries for {rows} prompts; give one for each")
    seeds = common.get("seed")
    found = []
    for row, own in enumerate(each):
        if name := next((name for name in _OF_THE_CALL if name in own), None):
            raise OptionError(f"row_options[{row}] names {name}, which is the whole call's; give it there")
        shared = dict(common)
        if isinstance(seeds, Sequence) and len(seeds) == rows:
            shared["seed"] = seeds[row]
        try:
            options = checked({**shared, **own})  # type: ignore[typeddict-item]
        except OptionError as error:
            raise OptionError(f"row_options[{row}]: {error}") from error
        if isinstance(options.seed, Sequence):
            raise OptionError(f"row_options[{row}]: seed is {shown(options.seed)}; it must be one number")
        found.append(options)
    return found


def _check_mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {shown(value)}; it must be a dict of options")
    return dict(value)
