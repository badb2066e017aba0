"""Which layer of a bundle's engines is wrong, where the graphs that they are built from are right.

An engine gives no outputs of layers, and to ask for them would make it another engine. So its graph is cut off behind a
layer, engines are built of what is left, and what they give is held to what ONNX Runtime's CPU kernels make of the very
same graph: the first layer that is off is found by halves.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.engines.cut import cut_behind
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.tensorrt import add_engines
from edgellm_runtime.bundle import MANIFEST, Bundle
from edgellm_runtime.loading import open_session
from edgellm_runtime.session import Session

__all__ = ["LOGITS", "Bisection", "Trial", "bisect_engines", "built_with"]

LOGITS = "logits"  # of the whole engines
_SINGLE = 4  # of a row's tokens, the last, which the engine for single tokens reads
# What sums in another order cost a token's output at most, relative in norm: of a layer whose manifest measured less.
_FLOORS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
Array = NDArray[Any]
Run = Callable[[Bundle], Session]  # a session of a bundle's engines
Sources = Sequence[Sequence[int]] | None


@dataclass(frozen=True)
class Trial:
    """Engines up to one layer.

    Args:
        name: of the layer, or :data:`LOGITS` for the bundle's own engines.
        difference: the largest of a token from the same graph on the CPU, relative in norm.
        bound: what it is held to.
    """

    name: str
    difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the engines compute what their graphs say; not where a difference is no number."""
        return self.difference <= self.bound


@dataclass(frozen=True)
class Bisection:
    """What :func:`bisect_engines` found.

    Args:
        wrong: the first layer whose engines are off; :data:`LOGITS` where it is behind the last; None: they hold.
        trials: in the order in which they were made, the bundle's own engines first.
    """

    wrong: str | None
    trials: tuple[Trial, ...]


def bisect_engines(
    bundle: Bundle, rows: Sequence[Sequence[int]], run: Run, build: Callable[[Bundle], Bundle], *,
    sources: Sources = None, tell: Callable[[str, float], None] = lambda what, share: None,
) -> Bisection:  # fmt: skip
    """Find the first layer whose engines do not compute what their graphs say.

    Args:
        bundle: with engines, whose graphs ONNX Runtime runs on this CPU.
        rows: token ids to read.
        run: opens a session of a bundle's engines, on the GPU.
        build: gives a bundle of graphs engines; of about log2(layers) of them.
        sources: what each row answers, of a bundle with an encoder, whose layers have no names to cut behind.
        tell: told what is done, and how much of it.

    Raises:
        BackendError: there is no GPU, or the graphs do not run here.
        EngineError: no engine can be built of a part.
    """
    layers = list(bundle.manifest.layers)
    tell("comparing the engines with their graphs", 0.0)
    trials = [_trial(LOGITS, bundle, bundle, rows, run, sources)]
    if trials[0].holds or not layers:
        return Bisection(None if trials[0].holds else LOGITS, tuple(trials))
    right, wrong = -1, len(layers)  # of what is known: the last that holds, and the first that does not
    while wrong - right > 1:
        middle = (right + wrong) // 2
        tell(f"building engines up to {layers[middle]}", len(trials) / (1 + len(layers).bit_length()))
        with tempfile.TemporaryDirectory(dir=bundle.path.parent) as scratch:
            part = build(cut_behind(bundle, layers[middle], Path(scratch) / "part"))
            trials.append(_trial(layers[middle], part, bundle, rows, run))
        right, wrong = (middle, wrong) if trials[-1].holds else (right, middle)
    return Bisection([*layers, LOGITS][wrong], tuple(trials))


def built_with(options: EngineOptions) -> Callable[[Bundle], Bundle]:
    """What gives a bundle engines: the installed library, for options."""

    def build(bundle: Bundle) -> Bundle:
        manifest = add_engines(bundle.path, bundle.manifest, options, lambda what, share: None)
        (bundle.path / MANIFEST).write_text(json.dumps(manifest.to_json(), allow_nan=False), encoding="utf-8")
        return Bundle(bundle.path, checksums=False)

    return build


def _trial(
    name: str, part: Bundle, whole: Bundle, rows: Sequence[Sequence[int]], run: Run, sources: Sources = None
) -> Trial:  # fmt: skip
    found, expected = (_read(each, rows, sources) for each in (run(part), open_session(part, device="cpu")))
    size = np.maximum(np.linalg.norm(expected, axis=-1), 1e-12)
    away = np.nan_to_num(np.linalg.norm(found - expected, axis=-1) / size, nan=np.inf, posinf=np.inf)
    measured = [figures["rounding"] for figures in whole.manifest.layers.values()]
    if name in whole.manifest.layers:
        measured = [whole.manifest.layers[name]["rounding"]]
    return Trial(name, float(away.max()), max([*measured, _FLOORS[whole.manifest.dtype]]))


def _read(session: Session, rows: Sequence[Sequence[int]], sources: Sources) -> Array:
    """What a session gives for rows, their last tokens one by one, (tokens, width)."""
    found = list[Array]()
    for at, row in enumerate(rows):
        tokens = np.asarray([list(row)], dtype=np.int64)
        state = session.new_state(1, len(row), sources=None if sources is None else [sources[at]])
        cuts = (0, *range(max(1, len(row) - _SINGLE), len(row) + 1))
        found += [session.step(tokens[:, a:b], state, logits="all")[0].copy() for a, b in itertools.pairwise(cuts)]
    return np.concatenate(found).astype(np.float64)
