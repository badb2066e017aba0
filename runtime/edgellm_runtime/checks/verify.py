"""A bundle proves itself on the device, with no PyTorch: goldens that the exporter took from PyTorch are run again.

Each check yields a figure and is held to the manifest's bound of that name. Nothing is skipped silently: a bound
without a figure fails.
"""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.batches import batch_difference, relative
from edgellm_runtime.checks.distance import distance, favourites, tie_width
from edgellm_runtime.checks.draft import DRAFTED, draft_difference, draft_goldens
from edgellm_runtime.checks.far import FAR, far_distances, far_golden, float_session, reads_floats
from edgellm_runtime.checks.goldens import ADAPTERS, EXACT, GOLDENS, Golden, goldens_file, read_goldens
from edgellm_runtime.checks.layers import LAYERS, layer_difference, layer_goldens, tapped
from edgellm_runtime.checks.meaning import MEANING, differences
from edgellm_runtime.errors import BundleError, first_line
from edgellm_runtime.session import Session
from edgellm_runtime.state import State

__all__ = [
    "ADAPTERS", "AT_LEAST", "EXACT", "GOLDENS", "Check", "Golden", "Verification", "distance", "exact_figures", "held",
    "read_goldens", "verify", "verify_quickly",
]  # fmt: skip

MARGIN = 3.0  # of a bound, to the largest difference from the same numbers that an export measured
# What sums in another order cost: no such bound is tighter than the one that a float bundle is held to.
ROUNDING: Mapping[str, float] = {"logits": 1e-4, "kl": 1e-6, "state": 1e-4, "hidden": 1e-4}
Array = NDArray[Any]
AT_LEAST = frozenset({"top1", "greedy"})  # figures that must not fall below their bound; all others must not exceed it
_WHAT = {
    "files": "every file is the one that was exported",
    "finite": "logits that are no finite numbers or all 0, share of a golden's: its numbers overflow or are spoiled",
    "logits": "logits against PyTorch's, largest difference relative to the largest logit",
    "kl": "mean KL divergence from PyTorch's distribution, nats a token",
    "top1": "tokens whose most likely successor is PyTorch's or tied with it there",
    "state": "carried state after the last token, relative difference from PyTorch's",
    "split": "token by token and after a rewind against all at once, largest relative difference of logits",
    "batch": "rows of a ragged batch against each row alone, largest relative difference of logits",
    "exact": "goldens of the same numbers without bounds",
    "exact.logits": "the same numbers in PyTorch: logits, largest difference relative to the largest logit",
    "exact.kl": "the same numbers in PyTorch: mean KL divergence, nats a token",
    "hidden": "last hidden states against PyTorch's: norms, and some of their numbers, relative difference",
    "exact.hidden": "the same numbers in PyTorch: last hidden states, relative difference",
    "drafter": "drafted tokens that are not PyTorch's, share, or their probabilities, largest difference",
    "exact.state": "the same numbers in PyTorch: carried state, relative difference",
    "kernels": "products of the library's kernels against NumPy's, largest relative difference; rounding is 0.006",
    "far.logits": "logits against PyTorch's, largest difference relative to the largest logit",
    "far.kl": "mean KL divergence from PyTorch's distribution, nats a token",
    "far.state": "what was written to the state, relative difference from PyTorch's",
    "layers": "outputs of the layers against PyTorch's, times their bounds",
    "meaning": "tokens, texts, template and limits are those of the export",
    "greedy": "greedy continuations equal to PyTorch's, share of tokens",
}


_DISTANCES = ("logits", "kl", "state")
_UNTIED = "top1 without ties"


@dataclass(frozen=True)
class Check:
    """One figure and whether it holds."""

    name: str
    ok: bool
    value: float
    bound: float
    what: str


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)


def held(name: str, value: float, bound: float) -> Check:
    """A figure held to its bound."""
    ok = value >= bound if name in AT_LEAST else value <= bound
    what = _WHAT.get(name, name)
    return Check(name, bool(ok), value, bound, what if value == value else f"{what}: no number came out")


def verify(
    bundle: Bundle, session: Session, progress: Callable[[str], None] = lambda _: None, *, measured: bool = True
) -> Verification:
    """Run every check that the manifest has a bound for.

    Args:
        bundle: opened with checksums.
        session: of that bundle.
        progress: told what is being checked.
        measured: whether the bounds for the same numbers and for layers are in the manifest; an export that is about to
            measure them says False.

    Raises:
        BundleError: the bundle has no goldens, or no bounds.
    """
    goldens, bounds = read_goldens(bundle), bundle.manifest.bounds
    if not bounds:
        raise BundleError(f"{bundle.path}: states no bounds to verify; export the model again")
    figures: dict[str, list[float]] = {}
    width = tie_width(bundle.manifest.measured, bounds)
    for number, golden in enumerate(goldens):
        progress(f"golden {number + 1} of {len(goldens)}")
        for name, value in _figures(session, golden, width).items():
            figures.setdefault(name, []).append(value)
    if wrong := figures.get("finite"):  # with such logits the other figures say nothing
        nothing = (held(name, float("nan"), bound) for name, bound in bounds.items())
        return Verification((held("files", 0.0, 0.0), held("finite", max(wrong), 0.0), *nothing))
    progress("ragged batch")
    figures["batch"] = [batch_difference(session, goldens)]
    checks = [held("files", 0.0, 0.0)]
    for name, bound in bounds.items():
        if name == MEANING:
            progress("texts and tokens")
            checks.append(_meaning(bundle))
            continue
        values = figures.get(name, [float("nan")])
        # numpy's, unlike Python's, let no NaN pass unseen
        value = float((np.min if name in AT_LEAST else np.mean if name == "kl" else np.max)(values))
        checks.append(held(name, value, bound))
        if name == "top1" and value > min(exactly := figures.get(_UNTIED, [value])):
            ties = f"{checks[-1].what}; {min(exactly):.3g} without ties, of logits less than {width:.2g} apart"
            checks[-1] = replace(checks[-1], what=ties)
    if MEANING not in bounds and MEANING in goldens_file(bundle):
        checks.append(replace(held(MEANING, 1.0, 0.0), what="there is a record of it and no bound"))
    checks += [_adapter(bundle, session, name) for name in bundle.manifest.adapters]
    progress("the same numbers")
    if measured:
        checks += _exact(bundle, session)
        progress("layers")
        checks += _layers(bundle, session)
        progress("far into the context")
        checks += _far(bundle, session)
    checks += _drafter(bundle, session)
    return Verification((*checks, *_kernels(bundle, session)))


def _drafter(bundle: Bundle, session: Session) -> list[Check]:
    """The drafter, where there is one, held to what PyTorch's proposes."""
    if bundle.manifest.drafter is None or session.drafter is None:
        return []
    return [held(DRAFTED, draft_difference(session.drafter, draft_goldens(bundle)), bundle.manifest.drafter.bound)]


def _kernels(bundle: Bundle, session: Session) -> list[Check]:
    """The library's quantized products against NumPy's, of each form that the graph has."""
    if session.device != "cpu" or bundle.manifest.graphs:
        return []
    from edgellm_runtime.backends.kernel_test import BOUND, forms_in, kernel_error
    from edgellm_runtime.graphs.onnx_file import read_model

    graph, own = bundle.file(GRAPH).read_bytes(), getattr(session, "kernels", None)
    forms = forms_in(read_model(own.swapped(graph)[0] if own else graph))
    return [held("kernels", max(map(kernel_error, forms)), BOUND)] if forms else []


def verify_quickly(bundle: Bundle, session: Session) -> Verification:
    """One golden in one step: for applications that look at each start whether this machine computes what it should.

    Held to PyTorch with the bundle's own numbers where it can be, else to the float model.

    Args:
        bundle: opened with checksums, or checked before.
        session: of that bundle.

    Raises:
        BundleError: the bundle has no goldens.
    """
    exact = bool(bundle.manifest.exact_bounds) and _of_these_kernels(bundle, session)
    goldens = read_goldens(bundle, EXACT if exact else "traces")
    bounds, prefix = (bundle.manifest.exact_bounds, f"{EXACT}.") if exact else (bundle.manifest.bounds, "")
    golden = goldens[0]
    state = session.new_state(1, len(golden.tokens), sources=golden.sources)
    logits, hidden = _outputs(session, golden.tokens, state)
    figures = distance(golden, logits, _carried(golden, state), hidden)
    # a mean over goldens is bounded, so that one of them may be as many times further off
    times = {"kl": 1.0 if exact else float(len(goldens))}
    checks = (
        held(f"{prefix}{name}", figures[name], bounds[name] * times.get(name, 1.0))
        for name in figures
        if name in bounds
    )
    return Verification((held("files", 0.0, 0.0), *checks))


def _adapter(bundle: Bundle, session: Session, name: str) -> Check:
    """Rows with an adapter held to their goldens: by how many times its bound the worst figure is off."""
    bounds, own, shares = bundle.manifest.bounds, session.with_adapter(name), [0.0]
    for golden in read_goldens(bundle, ADAPTERS, name):
        figures = _figures(own, golden)
        shares += [figures.get(figure, math.nan) / bounds[figure] for figure in _DISTANCES if figure in bounds]
    found = held(f"{ADAPTERS}.{name}", float(np.max(shares)), 1.0)
    return replace(found, what=f"rows with adapter {name}: the worst figure, in times its bound")


def _meaning(bundle: Bundle) -> Check:
    """How many things a bundle means otherwise than at its export; what it says of its bounds is one of them."""
    try:
        expected = goldens_file(bundle)[MEANING]
        names = differences(expected, bundle) + _loosened(bundle)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        names = [f"no record of it ({first_line(error)})"]
    found = held(MEANING, float(len(names)), 0.0)
    return replace(found, what=f"otherwise than at the export: {', '.join(names)}") if names else found


def _loosened(bundle: Bundle) -> list[str]:
    """Which bounds of the same numbers are not those that an export makes of what it measured."""
    manifest = bundle.manifest
    measured = {name: manifest.measured.get(f"{EXACT}.{name}", math.nan) for name in manifest.exact_bounds}
    made = exact_bounds(measured)
    return [f"{EXACT}.{n}" for n, bound in manifest.exact_bounds.items() if not bound <= made.get(n, 0) * (1 + 1e-9)]


def exact_bounds(measured: Mapping[str, float]) -> dict[str, float]:
    """Bounds for the largest differences that were measured from the goldens of the same numbers."""
    return {name: max(MARGIN * value, ROUNDING[name]) for name, value in measured.items() if name in ROUNDING}


def _exact(bundle: Bundle, session: Session) -> list[Check]:
    """The checks against PyTorch with the bundle's own numbers, where it has such goldens."""
    bounds = bundle.manifest.exact_bounds
    if not bounds:
        return [held(EXACT, 1.0, 0.0)] if EXACT in goldens_file(bundle) else []
    if not _of_these_kernels(bundle, session):
        made, here = bundle.manifest.provenance.get("machine"), platform.machine()
        where = f"the bounds are of {made}'s kernels, and those of {session.device} on {here} may round otherwise"
        return [Check(EXACT, True, 0.0, 0.0, f"the same numbers in PyTorch: not held here, for {where}")]
    found = exact_figures(session, read_goldens(bundle, EXACT))
    return [held(f"{EXACT}.{name}", found.get(name, float("nan")), bound) for name, bound in bounds.items()]


def _of_these_kernels(bundle: Bundle, session: Session) -> bool:
    """Whether bounds that were measured at the export are of the kernels that run here."""
    return bundle.manifest.provenance.get("machine") == platform.machine() and session.device.lower() == "cpu"


def _layers(bundle: Bundle, session: Session) -> list[Check]:
    """Each layer of one row held to its samples: by how many times its bound the worst is off; which is the first."""
    bounds = bundle.manifest.layers
    if not bounds or not _of_these_kernels(bundle, session):
        return []
    try:
        data = goldens_file(bundle)[LAYERS]
        row, samples = np.asarray(data["tokens"], dtype=np.int64), layer_goldens(data[LAYERS])
        if row.ndim != 1 or not 0 < len(row) <= bundle.manifest.max_context:
            raise ValueError(f"a row of shape {list(row.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{bundle.path}: no samples of its layers ({first_line(error)}); export it again") from error
    own = getattr(session, "kernels", None)
    outputs = tapped(bundle, threads=getattr(session, "threads", None), kernels=own).read(row)[1]
    shares = {
        path: layer_difference(samples[path], outputs[path]) / figures["bound"] if path in samples else math.nan
        for path, figures in bounds.items()
    }
    off = [path for path, share in shares.items() if not share <= 1]
    found = held(LAYERS, float(np.max(list(shares.values()))), 1.0)
    return [replace(found, what=f"the first layer that is off is {off[0]}; {found.what}") if off else found]


def _far(bundle: Bundle, session: Session) -> list[Check]:
    """A row that begins far into the context, all at once and token by token."""
    bounds = bundle.manifest.far
    if not bounds or not _of_these_kernels(bundle, session):
        return []
    try:
        data = goldens_file(bundle)[FAR]
        far = far_golden(data, session.width, session)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return [Check(FAR, False, math.nan, 0.0, f"no row far into its context ({first_line(error)}); export it again")]
    reader = float_session(bundle, getattr(session, "threads", None)) if reads_floats(bundle, data) else session
    found = far_distances(reader, far)
    values = {name: float(np.max([figures[name] for figures in found])) for name in found[0]}
    where = f"after {far.past} made-up tokens, "
    made = (held(f"{FAR}.{name}", values.get(name, math.nan), bound) for name, bound in bounds.items())
    return [replace(check, what=where + check.what) for check in made]


def exact_figures(session: Session, goldens: Sequence[Golden]) -> dict[str, float]:
    """The largest ``logits``, ``kl`` and ``state`` of any golden, all at once and then token by token.

    Args:
        session: of the bundle.
        goldens: of PyTorch with the bundle's own numbers.
    """
    found: dict[str, list[float]] = {}
    for golden in goldens:
        length = len(golden.tokens)
        for cuts in ((0, length),) if session.one_pass else ((0, length), (0, *range(length // 2, length + 1))):
            state = session.new_state(1, length, sources=golden.sources)
            parts = [_outputs(session, golden.tokens[start:end], state) for start, end in itertools.pairwise(cuts)]
            logits, hidden = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
            for name, value in distance(golden, logits, _carried(golden, state), hidden).items():
                found.setdefault(name, []).append(value)
    return {name: float(np.max(values)) for name, values in found.items()}  # numpy's lets no NaN pass unseen


def _figures(session: Session, golden: Golden, width: float = 0.0) -> dict[str, float]:
    state = session.new_state(1, len(golden.tokens) + len(golden.greedy), sources=golden.sources)
    logits, hidden = _outputs(session, golden.tokens, state)
    if wrong := float((~np.isfinite(logits)).mean()) or float(not logits.any()):
        return {"finite": wrong}
    top1, untied = favourites(golden, logits, width)
    figures = {
        **distance(golden, logits, _carried(golden, state), hidden),
        "top1": top1,
        _UNTIED: untied,
        **({} if session.one_pass else {"split": _split(session, golden, logits)}),
    }
    if len(golden.greedy):
        said = _greedy(session, state, logits[-1], len(golden.greedy))
        figures["greedy"] = float((said == golden.greedy).mean())
    return figures


def _outputs(session: Session, tokens: Array, state: State) -> tuple[Array, Array]:
    """Logits (time, vocab) and hidden states (time, features), of no features where there are none; copies."""
    if not session.hidden_width:
        logits = session.step(tokens[None], state, logits="all")[0].copy()
        return logits, np.zeros((len(tokens), 0), dtype=np.float32)
    logits, hidden = session.step_hidden(tokens[None], state, logits="all")
    return logits[0].copy(), hidden[0]


def _carried(golden: Golden, state: State) -> dict[str, Array]:
    """The one row of each carried tensor; not of a cache in 8 bits, whose loss shows in the logits."""
    return {s.name: state.read(s.name)[s.used(len(golden.tokens))][0] for s in state.specs if s.dtype != "int8"}


def _split(session: Session, golden: Golden, whole: Array) -> float:
    """Two chunks of unequal length, then one token at a time; then back as far as the state goes, and on in one chunk.

    The way back shows whether a state holds what its spec says: a ring whose window is larger than it says does not.
    """
    state, worst = session.new_state(1, len(golden.tokens), sources=golden.sources), 0.0
    cuts = sorted(
        {0, len(golden.tokens) // 3, len(golden.tokens) // 2, *range(len(golden.tokens) // 2, len(golden.tokens))}
    )
    for start, end in zip(cuts, [*cuts[1:], len(golden.tokens)], strict=True):
        part = session.step(golden.tokens[None, start:end], state, logits="all")[0]
        worst = float(np.maximum(worst, np.abs(part - whole[start:end]).max()))
    back = max(int(state.earliest[0]), len(golden.tokens) // 2)
    if back < len(golden.tokens):
        state.rewind(back)
        part = session.step(golden.tokens[None, back:], state, logits="all")[0]
        worst = float(np.maximum(worst, np.abs(part - whole[back:]).max()))
    return relative(worst, whole)


def _greedy(session: Session, state: State, logits: Array, count: int) -> Array:
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step(np.array([[tokens[-1]]]), state)[0, -1].argmax()))
    return np.array(tokens)
