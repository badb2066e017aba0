"""Where two models part: the same tokens read by both, layer by layer and step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.checks.evaluate import distances
from edgellm_runtime.errors import OptionError

__all__ = ["EXACT_TO", "VERDICTS", "Divergence", "LayerRow", "Limits", "Read", "StateRow", "diverge"]

Array = NDArray[Any]
# From a row of tokens (time,): logits (time, width), outputs of layers (time, features), and the state after it.
Read = Callable[[Array], tuple[Array, Mapping[str, Array], Mapping[str, Array]]]
VERDICTS = ("exact", "rounding", "quantization", "wrong")
EXACT_TO = 1e-6  # relative: float32's own last digits
LOGITS = "logits"  # the row after the last layer


@dataclass(frozen=True)
class Limits:
    """How far a layer may be from another model's.

    Args:
        rounding: the most that sums in another order make of a token's output, relative.
        quantization: the most that other formats of the weights make of it, as the median over tokens; 0 where the
            formats are the same.
    """

    rounding: float
    quantization: float = 0.0


@dataclass(frozen=True)
class LayerRow:
    """What one layer gives in both models.

    Args:
        name: its path, or ``logits``.
        cosine: the smallest of a token.
        norm_ratio: the one furthest from 1 of a token, found over expected.
        max_error: the largest difference of a number, relative to the largest number expected.
        typical: the median over tokens of the relative difference in norm.
        worst: the largest of a token.
        first_step: the first token, counted over all rows, that is further off than rounding or, if none is, than
            exact; None for none.
        verdict: one of :data:`VERDICTS`.
    """

    name: str
    cosine: float
    norm_ratio: float
    max_error: float
    typical: float
    worst: float
    first_step: int | None
    verdict: str


@dataclass(frozen=True)
class StateRow:
    """One carried tensor after the rows: the largest relative difference in norm."""

    name: str
    difference: float


@dataclass(frozen=True)
class Divergence:
    """What :func:`diverge` found.

    Args:
        layers: first to last, the logits behind them.
        state: each carried tensor that both have.
        steps: by layer, the relative difference at each token, (layers, tokens).
        kl: mean KL divergence from the expected distribution, nats a token.
        top1: share of tokens whose most likely successor is the same.
        tokens: that were read.
        ends: of the rows, in tokens counted over all of them.
    """

    layers: tuple[LayerRow, ...]
    state: tuple[StateRow, ...]
    steps: Array
    kl: float
    top1: float
    tokens: int
    ends: tuple[int, ...]

    @property
    def first(self) -> LayerRow | None:
        """The layer at which the two part: the first that is further off than rounding or, where those before it are
        exact, the first that is not. None where all that there is is rounding from the first layer on.
        """
        unlike = next((row for row in self.layers if row.verdict != "exact"), None)
        if unlike is None or unlike is not self.layers[0]:
            return unlike
        return next((row for row in self.layers if row.verdict not in ("exact", "rounding")), None)

    @property
    def wrong(self) -> LayerRow | None:
        """The first layer that neither rounding nor quantization explains."""
        return next((row for row in self.layers if row.verdict == "wrong"), None)

    @property
    def holds(self) -> bool:
        """Whether rounding and quantization explain every layer."""
        return self.wrong is None


def diverge(
    found: Read, expected: Read, rows: Sequence[Sequence[int]], limits: Mapping[str, Limits],
    progress: Callable[[float], None] = lambda _: None,
) -> Divergence:  # fmt: skip
    """Read rows of tokens with both models.

    Args:
        found: the model to be judged.
        expected: the one to be met.
        rows: token ids, at least two each.
        limits: by layer and ``logits``; layers that are not named are not compared.
        progress: told the share that is done.

    Raises:
        OptionError: there is no row, or a layer that the two have in another shape.
    """
    parts: dict[str, list[tuple[Array, Array]]] = {name: [] for name in limits}
    state: dict[str, float] = {}
    kl, same = list[Array](), list[Array]()
    for number, row in enumerate(rows):
        ids = np.asarray(row, dtype=np.int64)
        ours, theirs = found(ids), expected(ids)
        for name in parts:
            a, b = (one[0] if name == LOGITS else one[1][name] for one in (ours, theirs))
            if a.shape != b.shape:
                raise OptionError(f"{name} is {a.shape} here and {b.shape} there; compare versions of one model")
            parts[name].append((a, b))
        for name in ours[2].keys() & theirs[2].keys():
            difference = _relative(ours[2][name].reshape(1, -1), theirs[2][name].reshape(1, -1))[0]
            state[name] = float(np.maximum(state.get(name, 0.0), difference))  # numpy's lets no NaN pass unseen
        away = distances(theirs[0], ours[0], ids[:0])
        kl.append(away.kl)
        same.append(away.same)
        progress((number + 1) / len(rows))
    if not rows:
        raise OptionError("no tokens to read; give a longer text")
    each = {name: _relative(*_joined(pairs)) for name, pairs in parts.items()}
    return Divergence(
        layers=tuple(_row(name, *_joined(parts[name]), each[name], limits[name]) for name in parts),
        state=tuple(StateRow(name, state[name]) for name in sorted(state)),
        steps=np.stack(list(each.values())), kl=float(np.concatenate(kl).mean()),
        top1=float(np.concatenate(same).mean()), tokens=sum(map(len, rows)),
        ends=tuple(np.cumsum([len(row) for row in rows]).tolist()),
    )  # fmt: skip


def _joined(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    a, b = zip(*pairs, strict=True)
    return np.concatenate(a), np.concatenate(b)


def _relative(found: Array, expected: Array) -> Array:
    """The difference of each row in norm, relative to what is expected; infinite where something is not finite."""
    size = np.linalg.norm(expected.astype(np.float64), axis=-1)
    away = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    result: Array = np.nan_to_num(away / np.maximum(size, 1e-12), nan=math.inf, posinf=math.inf)
    return result


def _row(name: str, found: Array, expected: Array, each: Array, limits: Limits) -> LayerRow:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = [np.maximum(np.linalg.norm(x, axis=-1), 1e-300) for x in (a, b)]
    ratios = norms[0] / norms[1]
    off = np.flatnonzero(each > limits.rounding)
    off = off if len(off) else np.flatnonzero(each > EXACT_TO)
    with np.errstate(invalid="ignore"):
        cosine = float(((a * b).sum(-1) / norms[0] / norms[1]).min())
        largest = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-300))
    return LayerRow(
        name=name, cosine=cosine, norm_ratio=float(ratios[np.argmax(np.abs(np.log(ratios)))]), max_error=largest,
        typical=float(np.median(each)), worst=float(each.max()), first_step=int(off[0]) if len(off) else None,
        verdict=_verdict(each, limits),
    )  # fmt: skip


def _verdict(each: Array, limits: Limits) -> str:
    worst, typical = float(each.max()), float(np.median(each))
    if worst <= EXACT_TO:
        return "exact"
    if worst <= limits.rounding:
        return "rounding"
    return "quantization" if 0 < limits.quantization >= typical else "wrong"
