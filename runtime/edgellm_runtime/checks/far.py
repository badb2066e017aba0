"""A row that begins far into the context, over a past that both sides make from numbers alone.

To read thousands of tokens would take PyTorch minutes. A step does not ask how its past came about: it is given a state
whose numbers come from a counter, and reads a few tokens after it. So positions, windows and slots are tried where
goldens of short rows never come.
"""

from __future__ import annotations

import itertools
import math
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.distance import distance
from edgellm_runtime.checks.goldens import Golden, parse_golden
from edgellm_runtime.session import Session
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import HOST

__all__ = [
    "FAR", "FLOAT_INPUTS", "FORMS", "FarGolden", "far_distances", "far_golden", "far_outputs", "float_session",
    "made_up", "page_by_page", "reads_floats", "slots_filled", "written_slots",
]  # fmt: skip

FAR = "far"  # in the goldens
FLOAT_INPUTS = "float_inputs"  # in such a row: its numbers are those of products that round nothing they read
FORMS = ("whole", "single", "ragged")  # how the row is read
_SINGLE, _BESIDE = 4, 4  # of its tokens: the last that are read one by one, and the first that are beside another row
_NEAR, _SPREAD = 32, 32  # slots before the new tokens, and slots before those, that hold something
_LEVELS = 64  # of numbers, on either side of 0: every float holds them, and so do codes of a cache
_MOST_BYTES = 1 << 30  # of a state that goldens ask for
Array = NDArray[Any]


@dataclass(frozen=True)
class FarGolden:
    """What PyTorch computes for a row after a made-up past.

    Args:
        past: tokens that the row holds before.
        scales: of the made-up numbers, by state name.
        golden: of the tokens after it; its state is what these write.
    """

    past: int
    scales: Mapping[str, float]
    golden: Golden


def far_golden(data: Mapping[str, Any], vocab: int, session: Session) -> FarGolden:
    """Read one as a goldens file has it.

    Raises:
        ValueError: it does not fit the session's signature.
    """
    golden, past = parse_golden({**data, "greedy": []}, vocab), int(data["past"])
    scales = {str(name): float(scale) for name, scale in data["scales"].items()}
    total = past + len(golden.tokens)
    if not 0 < past < total <= session.max_context or not all(map(math.isfinite, scales.values())):
        raise ValueError(f"a past of {past} tokens in a context of {session.max_context}")
    if missing := {spec.name for spec in session.signature.state} - scales.keys():
        raise ValueError(f"no scale of {sorted(missing)}")
    if sum(spec.nbytes(1, total) for spec in session.signature.state) > _MOST_BYTES:
        raise ValueError(f"a state of more than {_MOST_BYTES} bytes")
    return FarGolden(past, scales, golden)


def slots_filled(past: int) -> Array:
    """Which slots of a made-up past hold something: those just before its end, and some all over it."""
    near = np.arange(max(0, past - _NEAR), past)
    spread = np.linspace(0, max(0, past - _NEAR - 1), min(past, _SPREAD)).astype(np.int64)
    return np.unique(np.concatenate([spread, near]))


def made_up(spec: StateSpec, past: int, scale: float) -> tuple[tuple[Any, ...], Array]:
    """Where a made-up past of one row has numbers, as an index into (1, ...), and these numbers.

    Codes of a cache in 8 bits are whole numbers, whatever the scale.
    """
    shape = list(spec.resolve(1, 1))
    axis = spec.axis if spec.update == "ring" else spec.capacity_axis
    where: tuple[Any, ...] = (slice(None),)
    if axis is not None:
        slots = np.arange(min(past, spec.resolve(1, 1)[axis])) if spec.update == "ring" else slots_filled(past)
        shape[axis] = len(slots)
        where = (*[slice(None)] * axis, slots)
    numbers = _numbers(spec.name, math.prod(shape)).reshape(shape)
    return where, numbers if spec.dtype == "int8" else numbers / _LEVELS * scale


def _numbers(name: str, count: int) -> Array:
    """Whole numbers from -64 to 63 that follow from a name: splitmix64 of a counter (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(57)).astype(np.int64) - _LEVELS


def reads_floats(bundle: Bundle, data: Mapping[str, Any]) -> bool:
    """Whether a far row is one for :func:`float_session`.

    Args:
        bundle: that has it.
        data: the row, as a goldens file has it.
    """
    return data.get(FLOAT_INPUTS) is True and not bundle.manifest.graphs


def float_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A bundle on this processor, its products with quantized weights reading floats.

    A model may take a made-up past so that inputs rounded to 8 bits move its logits by more than any fault would.
    Positions, windows and slots, which such a row is for, are in the graph all the same when its products read floats.
    """
    from edgellm_runtime.backends.ort import OrtBackend
    from edgellm_runtime.loading import session_of

    manifest = bundle.manifest
    backend = OrtBackend(
        bundle.file(GRAPH), manifest.signature, threads=threads, fusions=manifest.dtype == "float32", float_inputs=True
    )
    return session_of(bundle, backend)


def far_distances(session: Session, far: FarGolden) -> list[dict[str, float]]:
    """How far a session is from a far row, read in each of :data:`FORMS`."""
    found = []
    for form in FORMS:
        logits, written = far_outputs(session, far, form)
        golden, count = far.golden, len(logits)
        if not written:
            golden = replace(golden, state={})
        cut = {name: getattr(golden, name)[:count] for name in ("tokens", "top_ids", "top_logits", "logsumexp")}
        found.append(distance(replace(golden, **cut), logits, written))
    return found


def far_outputs(session: Session, far: FarGolden, form: str) -> tuple[Array, dict[str, Array]]:
    """Read a far row's tokens.

    Args:
        session: of the bundle.
        far: the row.
        form: all at once, the last one by one, or the first one by one beside a row with half as long a past.

    Returns:
        Logits (time, vocab), and what the tokens wrote by state name; not of a cache in 8 bits, nor where only the
        first were read.
    """
    length, rows = len(far.golden.tokens), 2 if form == "ragged" else 1
    state = _past_state(session, far, length, rows)
    cuts = {
        "whole": (0, length), "single": (0, *range(max(1, length - _SINGLE), length + 1)),
        "ragged": range(min(length, _BESIDE) + 1),
    }[form]  # fmt: skip
    tokens = np.repeat(far.golden.tokens[None], rows, axis=0)
    parts = [session.step(tokens[:, a:b], state, logits="all")[0].copy() for a, b in itertools.pairwise(cuts)]
    written = {
        s.name: np.asarray(state.read(s.name)[written_slots(s, far.past, length)][0])
        for s in state.specs
        if s.dtype != "int8" and cuts[-1] == length
    }
    return np.concatenate(parts), written


def written_slots(spec: StateSpec, past: int, length: int) -> tuple[Any, ...]:
    """Where, in a state (1, ...), is what the tokens after a past have written: all of it, unless slots are added."""
    axis = spec.capacity_axis
    if axis is None or spec.update == "ring":
        return ()
    return (*[slice(None)] * axis, slice(past, past + length))


def _past_state(session: Session, far: FarGolden, length: int, rows: int) -> State:
    state = session.new_state(rows, far.past + length)
    for spec in state.specs:
        where, numbers = made_up(spec, far.past, far.scales[spec.name])
        tensor = state.tensors[spec.name]
        if state.storage is HOST:
            if spec.capacity_axis is not None:
                tensor = state.tensors[spec.name] = page_by_page(tensor.shape, tensor.dtype)
            tensor[where] = numbers
        else:
            whole = np.zeros(spec.resolve(rows, state.capacity), dtype=np.float32)
            whole[where] = numbers
            state.storage.write(spec, tensor, whole)
    state.lengths[:] = [far.past, max(1, far.past // 2)][:rows]
    return state


def page_by_page(shape: Sequence[int], dtype: Any) -> Array:
    """Zeros that take memory only where they are written: a past of thousands of slots, of which some hold something.

    NumPy asks for large pages, of which one written number takes the whole.
    """
    count = math.prod(shape)
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), **flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)
