"""What PyTorch computes for some rows of tokens, in few passes over its weights: they may have to be read each time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm.models.protocol import LanguageModel, SourceModel, Step, empty_state, logit_width, with_hidden
from edgellm_exporters.errors import ParityError
from edgellm_exporters.graph.layers import layers_recorded
from edgellm_exporters.proof.section_backend import rest
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.session import Session

__all__ = ["Continuation", "Sources", "Trace", "check_finite", "continuations", "take_traces", "traces"]

Tokens = Sequence[int]
Sources = Sequence[Tokens] | None  # one for each row, of a model that answers sources
Open = Callable[[], Session]  # one that is dropped after use: a session holds its own copy of the weights
_LOGITS_BYTES = 128 << 20  # of the rows that are run together


@dataclass(frozen=True)
class Continuation:
    """What PyTorch says after a row, the most likely token each time.

    Args:
        tokens: as far as they are known.
        agreed: the share of the tokens asked for that the bundle says too, up to the first where it does not.
    """

    tokens: tuple[int, ...]
    agreed: float


@dataclass(frozen=True)
class Trace:
    """What PyTorch computes for one row, read from an empty state.

    Args:
        tokens: the row.
        logits: (time, vocab), after each token.
        state: after the last token, by the specs' names: (...) of this row, its slots in use.
        layers: what each layer gave, by path: (time, features).
        source: what the row answers; None: nothing.
        hidden: (time, features), what logits are projected from; None where the model does not show it.
    """

    tokens: list[int]
    logits: Tensor
    state: Mapping[str, Tensor]
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    source: list[int] | None = None
    hidden: Tensor | None = None

    @property
    def sources(self) -> list[list[int]] | None:
        """As a session's new state takes them."""
        return None if self.source is None else [self.source]

    def alone(self) -> Trace:
        """A copy that holds nothing of the rows that were run beside it, as views of theirs would."""
        state, layers = ({n: x.clone() for n, x in given.items()} for given in (self.state, self.layers))
        hidden = None if self.hidden is None else self.hidden.clone()
        return Trace(self.tokens, self.logits.clone(), state, layers, self.source, hidden)

    def without_logits(self) -> Trace:
        """What is left of it when its logits, by far the most, have been looked at."""
        return replace(self, logits=self.logits.new_empty(0)).alone()


def traces(model: LanguageModel, rows: Sequence[Tokens], sources: Sources = None) -> Iterator[Trace]:
    """Run rows from empty states; neighbours of equal length together, as many as memory allows.

    Sections of graphs that are loaded meanwhile are not while PyTorch runs: its logits would come on top of them.

    Args:
        model: the reference, in eval mode.
        rows: token ids, at least one each.
        sources: what each answers, for a model that answers sources; rows are then run one by one.
    """
    if sources is not None:
        yield from (_answered(model, row, source) for row, source in zip(rows, sources, strict=True))
        return
    start = 0
    while start < len(rows):
        length = len(rows[start])
        most = max(1, _LOGITS_BYTES // (4 * length * model.config.vocab_size))
        rest()
        same = list(itertools.takewhile(lambda row: len(row) == length, rows[start : start + most]))  # noqa: B023
        tokens = torch.tensor([list(row) for row in same])  # (batch, time)
        # not as a decorator, which would hold what a generator gave while it makes what comes next
        with torch.no_grad(), layers_recorded(model) as layers:  # type: ignore[arg-type]
            empty = empty_state(model, len(tokens), length)
            (logits, state), hidden = with_hidden(model, tokens, empty, Step.whole(tokens))
        for i, row in enumerate(same):
            used = {spec.name: state[spec.name][spec.used(length)][i] for spec in model.state_specs()}
            # a list may hold other modules than layers, such as one that makes the same table for every row
            given = {path: tensor[i] for path, tensor in layers.items() if tensor.shape[:2] == tokens.shape}
            yield Trace(list(row), logits[i], used, given, hidden=None if hidden is None else hidden[i])
        start += len(same)
        del logits, state, hidden, layers, used, given  # or these rows would be in memory beside the next


@torch.no_grad()
def _answered(model: LanguageModel, row: Tokens, source: Tokens) -> Trace:
    """The trace of one row that answers a source."""
    assert isinstance(model, SourceModel)
    tokens, read = torch.tensor([list(row)]), torch.tensor([list(source)])
    made = model.encode(read, torch.tensor([len(source)], dtype=torch.int32))
    past = {**empty_state(model, 1, len(row)), **made}
    (logits, state), hidden = with_hidden(model, tokens, past, Step.whole(tokens))
    state = {**made, **state}
    used = {spec.name: state[spec.name][spec.used(len(row))][0] for spec in model.state_specs()}
    last = None if hidden is None else hidden[0]
    return Trace(list(row), logits[0], used, source=list(source), hidden=last)


def take_traces(
    model: LanguageModel, open_session: Open, rows: Sequence[Tokens], count: int, *, whole: bool, max_context: int,
    sources: Sources = None,
) -> tuple[list[Trace], list[Continuation]]:  # fmt: skip
    """Run rows and find out what PyTorch says after them; one pass where all of the state is appended to.

    Args:
        model: the reference, in eval mode.
        open_session: gives a session of the bundle; it is dropped before PyTorch runs.
        rows: token ids.
        count: the most tokens to say after each.
        whole: as for :func:`continuations`.
        max_context: the most tokens of a row in the bundle.
        sources: as for :func:`traces`.
    """
    predicts = logit_width(model.config) == model.config.vocab_size  # labels are nothing to go on with
    counts = [min(count, max_context - len(row)) if predicts else 0 for row in rows]
    found, longer = continuations(model, open_session, rows, counts, whole=whole, sources=sources)
    if all(spec.update == "append" or spec.encoded for spec in model.state_specs()):
        return [_cut(model, trace, len(row)) for trace, row in zip(longer, rows, strict=True)], found
    return list(traces(model, rows, sources)), found


def continuations(
    model: LanguageModel, open_session: Open, rows: Sequence[Tokens], counts: Sequence[int], *, whole: bool,
    sources: Sources = None, dropped: bool = True,
) -> tuple[list[Continuation], list[Trace]]:  # fmt: skip
    """What PyTorch says after each row.

    The bundle proposes, and one pass of PyTorch over a row with its proposal tells how far PyTorch agrees; after that
    many tokens comes the one that PyTorch says instead.

    Args:
        model: the reference, in eval mode.
        open_session: gives a session of the bundle.
        rows: token ids.
        counts: tokens after each.
        whole: go on from there until every continuation is complete, with another pass for each disagreement; otherwise
            a continuation ends with the first token that the bundle does not say.
        sources: as for :func:`traces`.
        dropped: nobody else holds the session, so its memory is given back before PyTorch runs.

    Returns:
        The continuations, and the first pass's traces: of rows with the bundle's proposals, all but the last token.
    """
    drafts, longer = _proposed(model, open_session, rows, counts, sources, dropped)
    said = [_confirmed(trace, draft) for trace, draft in zip(longer, drafts, strict=True)]
    same = [sum(a == b for a, b in zip(s, d, strict=False)) for s, d in zip(said, drafts, strict=True)]
    while whole and (unfinished := [i for i, tokens in enumerate(said) if len(tokens) < counts[i]]):
        so_far = [[*rows[i], *said[i]] for i in unfinished]
        theirs = None if sources is None else [sources[i] for i in unfinished]
        left = [counts[i] - len(said[i]) for i in unfinished]
        drafts, more = _proposed(model, open_session, so_far, left, theirs, dropped)
        for i, trace, draft in zip(unfinished, more, drafts, strict=True):
            said[i] += _confirmed(trace, draft)
    agreed = [n / count if count else 1.0 for n, count in zip(same, counts, strict=True)]
    found = [Continuation(tuple(s), share) for s, share in zip(said, agreed, strict=True)]
    return found, longer


def _proposed(
    model: LanguageModel,
    open_session: Open,
    rows: Sequence[Tokens],
    counts: Sequence[int],
    sources: Sources,
    dropped: bool,
) -> tuple[list[list[int]], list[Trace]]:
    """The bundle's continuations, and PyTorch's traces of each row followed by all of its continuation but the last."""
    session = open_session()
    each = [None] * len(rows) if sources is None else [[source] for source in sources]
    drafts = [propose(session, row, n, source) for row, n, source in zip(rows, counts, each, strict=True)]
    del session  # held by what it gave, too
    if dropped:
        give_back()
    return drafts, list(traces(model, [[*row, *draft[:-1]] for row, draft in zip(rows, drafts, strict=True)], sources))


def propose(session: Session, prompt: Tokens, count: int, sources: Sources = None) -> list[int]:
    """What a bundle says after a prompt, in answer to a source where there is one, the most likely token each time."""
    state = session.new_state(1, len(prompt) + count, sources=sources)
    tokens, said = np.asarray([list(prompt)]), list[int]()
    for _ in range(count):
        said.append(int(session.step(tokens, state)[0, -1].argmax()))
        tokens = np.asarray([[said[-1]]])
    return said


def _confirmed(trace: Trace, draft: Sequence[int]) -> list[int]:
    """PyTorch's words up to the first that is not the draft's, from a trace of the row with the draft but its last."""
    if not draft:
        return []
    own: list[int] = trace.logits[-len(draft) :].argmax(dim=-1).tolist()
    agreed = next((i for i, (a, b) in enumerate(zip(own, draft, strict=True)) if a != b), len(own) - 1)
    return own[: agreed + 1]


def _cut(model: LanguageModel, trace: Trace, length: int) -> Trace:
    """The trace of a row's first tokens: nothing that was computed for them depends on later ones."""
    axes = {spec.name: spec.capacity_axis for spec in model.state_specs()}
    state = {n: t if axes[n] is None else t.narrow(axes[n] - 1, 0, length) for n, t in trace.state.items()}  # type: ignore[operator]
    layers = {path: tensor[:length] for path, tensor in trace.layers.items()}
    hidden = None if trace.hidden is None else trace.hidden[:length]
    return Trace(trace.tokens[:length], trace.logits[:length], state, layers, trace.source, hidden)


def check_finite(logits: NDArray[Any], start: int) -> None:
    """Refuse what proves nothing.

    Args:
        logits: PyTorch's for some tokens of a row, (tokens, vocab).
        start: the first one's place in the row.

    Raises:
        ParityError: some are NaN or infinite.
    """
    finite = np.isfinite(logits).all(-1)
    if not finite.all():
        raise ParityError(
            f"PyTorch computes no finite logits at token {start + int(np.argmin(finite))} of a row; train the model "
            "on, or repair its weights"
        )
