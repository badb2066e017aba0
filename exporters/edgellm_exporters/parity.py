"""Does the bundle compute what PyTorch computes? Teacher-forced over real text, state, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm_exporters.goldens import greedy_tokens
from edgellm_runtime.session import Session
from edgellm_runtime.verify import Check, held

__all__ = ["ParityReport", "compare", "kl_divergence"]

Array = NDArray[Any]
_STATE_TOKENS = 32


@dataclass(frozen=True)
class ParityReport:
    """What :func:`compare` found.

    Args:
        tokens: positions compared.
        logits: largest difference of a logit, relative to the largest logit of its window.
        kl: mean KL divergence from PyTorch's distribution to the bundle's, nats a token.
        kl_p99: its 99th percentile.
        top1: share of positions where both have the same most likely token.
        state: largest relative difference of a carried tensor, in norm.
        greedy: share of equal tokens in greedy continuations; 1 when none were asked for.
        perplexity: the bundle's over the text.
        reference_perplexity: PyTorch's.
        first_divergence: window and position where the most likely tokens first differ, or None.
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

    def checks(self, bounds: dict[str, float]) -> list[Check]:
        """Its figures held to those bounds that it has a figure for."""
        return [held(name, getattr(self, name), bound) for name, bound in bounds.items() if hasattr(self, name)]


def compare(
    model: LanguageModel, session: Session, windows: Sequence[Sequence[int]], *,
    greedy_prompts: Sequence[Sequence[int]] = (), greedy_count: int = 16,
    progress: Callable[[float], None] = lambda _: None,
) -> ParityReport:  # fmt: skip
    """Run both over the same tokens.

    Args:
        model: the reference, in eval mode.
        session: of the bundle.
        windows: rows of token ids, each read from an empty state.
        greedy_prompts: rows to continue greedily with both.
        greedy_count: tokens of each continuation.
        progress: told the share that is done.

    Returns:
        The differences.
    """
    kls: list[Array] = []
    matches: list[Array] = []
    nlls: list[Array] = []
    reference_nlls: list[Array] = []
    worst, first = 0.0, None
    for number, window in enumerate(windows):
        for start, ours, theirs in _logits(model, session, np.asarray(window, dtype=np.int64)):
            worst = float(np.maximum(worst, float((ours - theirs).abs().max() / theirs.abs().max())))
            p, q = theirs.log_softmax(dim=1), ours.log_softmax(dim=1)
            kls.append(kl_divergence(p, q).numpy())
            same = (ours.argmax(dim=1) == theirs.argmax(dim=1)).numpy()
            matches.append(same)
            if first is None and not same.all():
                first = (number, start + int(np.argmin(same)))
            targets = torch.as_tensor(window[start + 1 : start + 1 + len(ours)])[:, None]
            nlls.append(-q[: len(targets)].gather(1, targets)[:, 0].numpy())
            reference_nlls.append(-p[: len(targets)].gather(1, targets)[:, 0].numpy())
        progress((number + 1) / len(windows))
    kl = np.concatenate(kls)
    return ParityReport(
        tokens=len(kl), logits=worst, kl=float(kl.mean()), kl_p99=float(np.percentile(kl, 99)),
        top1=float(np.concatenate(matches).mean()), state=_state(model, session, windows[0][:_STATE_TOKENS]),
        greedy=_greedy(model, session, greedy_prompts, greedy_count),
        perplexity=float(np.exp(np.concatenate(nlls).mean())),
        reference_perplexity=float(np.exp(np.concatenate(reference_nlls).mean())), first_divergence=first,
    )  # fmt: skip


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) for each row of log-probabilities, nats."""
    return (p.exp() * (p - q)).sum(dim=1)


_PIECE = 128  # positions whose logits are held at a time: a vocabulary of 150,000 in float64 is large


@torch.no_grad()
def _logits(model: LanguageModel, session: Session, window: Array) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Both sides' logits over one window, piece by piece: start, bundle's and PyTorch's (positions, vocab)."""
    state = session.new_state(1, len(window))
    theirs = model(torch.from_numpy(window)[None])[0][0]
    for start in range(0, len(window), _PIECE):
        piece = window[start : start + _PIECE]
        ours = torch.from_numpy(session.step(piece[None], state, logits="all")[0])
        yield start, ours.double(), theirs[start : start + _PIECE].double()


@torch.no_grad()
def _state(model: LanguageModel, session: Session, row: Sequence[int]) -> float:
    tokens = torch.tensor([list(row)])
    _, theirs = model(tokens, empty_state(model, 1, len(row)), Step.whole(tokens))
    ours = session.new_state(1, len(row))
    session.step(tokens.numpy(), ours, logits="none")
    worst = 0.0
    for spec in session.signature.state:
        found, axis = ours.tensors[spec.name], spec.capacity_axis
        found = found if axis is None else found.take(range(len(row)), axis=axis)
        expected = theirs[spec.name].double().numpy()
        worst = float(np.maximum(worst, np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-12)))
    return worst


def _greedy(model: LanguageModel, session: Session, prompts: Sequence[Sequence[int]], count: int) -> float:
    equal = []
    for prompt in prompts:
        expected = greedy_tokens(model, prompt, count)
        state = session.new_state(1, len(prompt) + count)
        logits, said = session.step(np.asarray([list(prompt)]), state), []
        for _ in range(count):
            said.append(int(logits[0, -1].argmax()))
            logits = session.step(np.asarray([[said[-1]]]), state)
        equal.append(np.mean(np.asarray(said) == np.asarray(expected)))
    return float(np.mean(equal)) if equal else 1.0
