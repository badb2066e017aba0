"""Does the bundle compute what PyTorch computes? Teacher-forced over real text, state, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edgellm.models.protocol import LanguageModel
from edgellm_exporters.errors import ParityError
from edgellm_exporters.proof.traces import Continuation, Sources, Trace, check_finite, continuations, traces
from edgellm_runtime.checks.evaluate import distances, mean_interval, piece_length
from edgellm_runtime.checks.verify import Check, held
from edgellm_runtime.session import Session
from edgellm_runtime.spec import ADAPTER
from edgellm_runtime.state import State

__all__ = ["ParityReport", "compare", "measure", "unequal"]

Array = NDArray[Any]


@dataclass(frozen=True)
class ParityReport:
    """What :func:`compare` found.

    Args:
        tokens: positions compared.
        logits: largest difference of a logit, relative to the largest logit of its window.
        kl: mean KL divergence from PyTorch's distribution to the bundle's, nats a token.
        kl_p99: its 99th percentile.
        top1: share of positions where both have the same most likely token.
        state: largest relative difference of a carried tensor after the first window, in norm.
        greedy: share of greedy continuations up to their first difference; 1 when none were asked for.
        perplexity: the bundle's over the text.
        reference_perplexity: PyTorch's.
        first_divergence: window and position where the most likely tokens first differ, or None.
        kl_interval: a 95% interval of ``kl``.
    """

    tokens: int
    logits: float
    kl: float
    kl_p99: float
    top1: float
    state: float
    greedy: float
    perplexity: float
    reference_perplexity: float
    first_divergence: tuple[int, int] | None
    kl_interval: tuple[float, float] = (float("nan"), float("nan"))

    def checks(self, bounds: dict[str, float]) -> list[Check]:
        """Its figures held to those bounds that it has a figure for."""
        return [held(name, getattr(self, name), bound) for name, bound in bounds.items() if hasattr(self, name)]


def compare(
    model: LanguageModel, session: Session, windows: Sequence[Sequence[int]], *,
    greedy_prompts: Sequence[Sequence[int]] = (), greedy_count: int = 16, sources: Sources = None,
    progress: Callable[[float], None] = lambda _: None,
) -> ParityReport:  # fmt: skip
    """Run both over the same tokens.

    Args:
        model: the reference, in eval mode.
        session: of the bundle.
        windows: rows of token ids, each read from an empty state.
        greedy_prompts: rows to continue greedily with both.
        greedy_count: tokens of each continuation.
        sources: what windows answer, and prompts as many as there are, where the model answers sources.
        progress: told the share that is done.

    Returns:
        The differences.
    """
    said: Sequence[Continuation] = ()
    if greedy_prompts:
        said, _ = continuations(
            model, lambda: session, greedy_prompts, [greedy_count] * len(greedy_prompts), whole=False,
            sources=None if sources is None else sources[: len(greedy_prompts)], dropped=False,
        )  # fmt: skip
    return measure(session, traces(model, windows, sources), len(windows), said, progress)


@torch.no_grad()
def measure(
    session: Session, references: Iterable[Trace], count: int, said: Sequence[Continuation],
    progress: Callable[[float], None] = lambda _: None,
) -> ParityReport:  # fmt: skip
    """Hold a bundle to what PyTorch has computed already.

    Args:
        session: of the bundle.
        references: of rows of tokens, at least one.
        count: how many they are.
        said: what PyTorch says after some rows.
        progress: told the share that is done.
    """
    parts: list[_Part] = []
    worst, state, first = 0.0, 0.0, None
    number = 0  # enumerate() would hold one reference while the next is computed
    for reference in references:
        own = session.new_state(1, len(reference.tokens), sources=reference.sources)
        row = list(_parts(session, own, reference))
        if not (largest := np.max([p.largest for p in row])):
            raise ParityError(
                "PyTorch computes logits that are all 0, which choose nothing and prove nothing; train the model on, "
                "or repair the weights of its output"
            )
        difference = np.max([p.difference for p in row]) / largest
        worst = float(np.maximum(worst, difference))  # numpy's, unlike Python's, lets no NaN pass unseen
        same = np.concatenate([p.same for p in row])
        if first is None and not same.all():
            first = (number, int(np.argmin(same)))
        parts += row
        if number == 0:
            state = _state(reference, own)
        del reference, own  # as these would be
        number += 1  # noqa: SIM113
        progress(number / count)
    kl = np.concatenate([p.kl for p in parts])
    return ParityReport(
        tokens=len(kl), logits=worst, kl=float(kl.mean()), kl_p99=float(np.percentile(kl, 99)),
        top1=float(np.concatenate([p.same for p in parts]).mean()), state=state,
        greedy=float(np.mean([s.agreed for s in said])) if said else 1.0,
        perplexity=_perplexity([p.nll for p in parts]),
        reference_perplexity=_perplexity([p.reference_nll for p in parts]),
        first_divergence=first, kl_interval=mean_interval(kl),
    )  # fmt: skip


def _perplexity(nats: Sequence[Array]) -> float:
    """NaN where no token was predicted, as by a model that labels."""
    found = np.concatenate(nats)
    return float(np.exp(found.mean())) if len(found) else float("nan")


def unequal(checks: Sequence[Check], dtype: str, method: str, caches: str = "") -> str:
    """A sentence on checks some of which do not hold: each figure once, as it is worst, and what to do.

    Args:
        checks: of one bundle.
        dtype: what it computes in.
        method: that its weights are quantized by, or ``none``.
        caches: what keys and values are kept in, if in fewer bits.
    """
    worst: dict[str, Check] = {}
    for check in (c for c in checks if not c.ok):
        known = worst.get(check.name)
        if known is None or not _nearer(check, known):
            worst[check.name] = check
    figures = "; ".join(f"{c.name} is {c.value:.3g}, bound {c.bound:.3g}" for c in worst.values())
    lost = [c.name for c in worst.values() if not np.isfinite(c.value)]
    if lost and dtype == "float16":
        remedy = "its numbers are beyond what float16 holds, so use bfloat16"
    elif lost:
        remedy = "it gives NaN or infinite numbers, so look for a softmax over nothing, a log or a division by zero"
    elif dtype != "float32":
        remedy = f"{dtype} may be too coarse for it, so try another dtype"
    elif method == "auto":
        remedy = "formats that hold the limit on the text may not on others, so give a smaller --max-kl"
    elif method != "none":
        remedy = "its weights may need a finer format, so try another --quantize"
    else:
        remedy = (
            "its forward may give other numbers in steps than at once, so hold its steps against the whole in PyTorch, "
            "with padding and with a past"
        )
    remedy += f", or leave the cache in {caches} out" if caches else ""
    return f"the bundle does not compute what PyTorch computes: {figures}; {remedy}; no bundle was written"


def _nearer(check: Check, other: Check) -> bool:
    """Whether a figure is nearer to its bound than another of its name; NaN is never."""
    return bool(abs(check.value - check.bound) <= abs(other.value - other.bound))


class _Part(NamedTuple):
    """The figures of some neighbouring positions, one each."""

    difference: float  # the largest of a logit
    largest: float  # PyTorch's largest logit
    kl: Array
    same: Array
    nll: Array  # one fewer at a row's end
    reference_nll: Array


_PIECE = 128  # positions that the bundle reads at a time


def _parts(session: Session, state: State, reference: Trace) -> Iterator[_Part]:
    """Both sides' figures over one row, which the bundle reads into its state."""
    row = np.asarray(reference.tokens, dtype=np.int64)
    length = piece_length(session) if session.one_pass else min(_PIECE, piece_length(session))
    for start in range(0, len(row), length):
        ours = session.step(row[None, start : start + length], state, logits="all")[0]
        theirs = reference.logits[start : start + len(ours)].float().numpy()
        check_finite(theirs, start)
        targets = row[start + 1 : start + 1 + len(ours)] if session.predicts_tokens else row[:0]
        found = distances(theirs, ours, targets)
        difference = np.max([np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)])  # no copies of all rows
        largest = np.maximum(theirs.max(), -theirs.min())
        yield _Part(float(difference), float(largest), found.kl, found.same, found.nll, found.reference_nll)


def _state(reference: Trace, own: State) -> float:
    worst = 0.0
    for spec in own.specs:
        if spec.dtype == "int8":  # codes of a cache: what they lose shows in the logits
            continue
        if spec.name == ADAPTER and spec.name not in reference.state:  # the reference has one merged, or has none
            continue
        found = own.read(spec.name)[spec.used(len(reference.tokens))][0]
        expected = reference.state[spec.name].double().numpy()
        worst = float(np.maximum(worst, np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-12)))
    return worst
