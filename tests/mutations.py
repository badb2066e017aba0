"""Bundles whose numbers someone has changed, checksums rewritten: which of the changes that matter does verify find?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from families import VOCAB, make
from numpy.typing import NDArray
from tiny_files import copied, sign

from edgellm.cli.diff import diff_models
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.evaluate import distances
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.errors import RuntimeFault

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
HARMFUL = 1e-4  # of the KL divergence from the bundle as it was, nats a token
CACHE = "8-bit cache"  # as a method: float weights, keys and values in 8 bits
HALVES = "16-bit cache"  # the same in 16
Array = NDArray[Any]
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}
_FLOATS = (np.float32, np.float16)
_LAYER = re.compile(r"((?:layers|blocks)\.\d+)\.")
_DISTANCE = {"files", "finite", "logits", "kl", "top1", "state", "split", "batch", "greedy"}  # of the float model
_LAST = "logits"  # what diff calls all that comes after the layers


class Missing(Exception):
    """A bundle has nothing that a kind of change would change."""


class Numbers:
    """A bundle's graph and weights, to change.

    Args:
        bundle: a copy.
    """

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self.graph = onnx.load(str(bundle / GRAPH), load_external_data=False)
        self._data = bytearray((bundle / WEIGHTS).read_bytes())
        self._found = {i.name: i for i in self.graph.graph.initializer if i.data_type in _TYPES}
        self.changed: list[str] = []

    def names(self, holds: Callable[[str, tuple[int, ...]], bool]) -> list[str]:
        """Tensors whose name and shape a condition holds for."""
        return sorted(name for name, i in self._found.items() if holds(name, tuple(i.dims)))

    def one(self, draw: np.random.Generator, holds: Callable[[str, tuple[int, ...]], bool]) -> str:
        """One of these."""
        if not (found := self.names(holds)):
            raise Missing
        return str(draw.choice(found))

    def get(self, name: str) -> Array:
        """A copy of a tensor."""
        tensor = self._found[name]
        start, length = self._place(tensor)
        raw = self._data[start : start + length] if length else tensor.raw_data
        return np.frombuffer(bytes(raw), _TYPES[tensor.data_type]).reshape(tensor.dims).copy()

    def put(self, name: str, value: Array) -> None:
        """Give a tensor other numbers of its shape and type."""
        tensor = self._found[name]
        self.changed.append(name)
        start, length = self._place(tensor)
        raw = value.astype(_TYPES[tensor.data_type]).tobytes()
        if length:
            self._data[start : start + length] = raw
        else:
            tensor.raw_data = raw

    def attributes(self, name: str, *, needed: bool = True) -> list[Any]:
        """Every attribute of that name in the graph."""
        found = [a for node in self.graph.graph.node for a in node.attribute if a.name == name]
        if needed and not found:
            raise Missing
        return found

    def write(self) -> None:
        """Into the bundle, whose manifest then says that all is as it was made."""
        (self._bundle / GRAPH).write_bytes(self.graph.SerializeToString())
        (self._bundle / WEIGHTS).write_bytes(self._data)
        sign(self._bundle, GRAPH, WEIGHTS)

    @staticmethod
    def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
        said = {entry.key: entry.value for entry in tensor.external_data}
        return int(said.get("offset", 0)), int(said.get("length", 0))


Change = Callable[[Numbers, np.random.Generator], None]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    ends = (".scales", ".zeros", ".table")
    return len(shape) > 1 and "rotary" not in name and "const." not in name and not name.endswith(ends)


def _is_scale(numbers: Numbers) -> Callable[[str, tuple[int, ...]], bool]:
    scales = numbers.names(lambda n, shape: n.endswith("scales") and len(shape) > 1)
    return (lambda n, _: n in scales) if scales else _is_matrix


def codes(numbers: Numbers, draw: np.random.Generator) -> None:
    """Some of a weight's numbers in any order, or any codes instead."""
    name = numbers.one(draw, _is_matrix)
    flat = (whole := numbers.get(name)).reshape(-1)
    size = len(flat) // 16
    start = int(draw.integers(0, len(flat) - size))
    part = flat[start : start + size]
    part[:] = draw.permutation(part) if part.dtype in _FLOATS else draw.integers(0, 256, size).astype(part.dtype)
    numbers.put(name, whole)


def scale(numbers: Numbers, draw: np.random.Generator) -> None:
    """One scale is doubled; of float weights, one row."""
    name = numbers.one(draw, _is_scale(numbers))
    value = numbers.get(name)
    row = int(draw.integers(0, len(value)))
    if value.dtype == np.float32:
        value[row] *= 2
    else:
        value[row, int(draw.integers(0, value.shape[1]))] *= 2
    numbers.put(name, value)


def zero(numbers: Numbers, draw: np.random.Generator) -> None:
    """The zeros of some rows are others."""
    name = numbers.one(draw, lambda n, shape: n.endswith("zeros") and len(shape) > 1)
    value = numbers.get(name)
    start = int(draw.integers(0, max(1, len(value) - 8)))
    value[start : start + 8] ^= 0x55
    numbers.put(name, value)


def gain(numbers: Numbers, draw: np.random.Generator) -> None:
    """A norm's gain is zero."""
    name = numbers.one(draw, lambda n, shape: "norm" in n and len(shape) == 1)
    numbers.put(name, numbers.get(name) * 0)


def layers(numbers: Numbers, _draw: np.random.Generator) -> None:
    """Two layers have changed places, as far as they are alike."""
    pairs = [
        (name, other)
        for name in numbers.names(lambda n, _: _LAYER.match(n) is not None and ".0." in n)
        for other in numbers.names(lambda n, s, name=name: n == name.replace(".0.", ".1.", 1))  # type: ignore[misc]
        if numbers.get(name).shape == numbers.get(other).shape
    ]
    if not pairs:
        raise Missing
    for name, other in pairs:
        mine, theirs = numbers.get(name), numbers.get(other)
        numbers.put(name, theirs)
        numbers.put(other, mine)


def base(numbers: Numbers, draw: np.random.Generator) -> None:
    """Positions are rotated with another base."""
    tables = [numbers.one(draw, lambda n, _, end=end: "rotary" in n and n.endswith(end)) for end in ("cos", "sin")]  # type: ignore[misc]
    cos, sin = map(numbers.get, tables)
    frequency = np.arctan2(sin[1], cos[1]) ** draw.choice([0.5, 0.8, 0.95, 1.05, 1.3])
    angle = np.arange(len(cos))[:, None] * frequency
    numbers.put(tables[0], np.cos(angle))
    numbers.put(tables[1], np.sin(angle))


def _value_rows(numbers: Numbers, draw: np.random.Generator) -> tuple[list[str], int]:
    """The tensors of a merged projection whose last rows make values, and how many rows a head has."""
    name = numbers.one(draw, lambda n, s: "v_proj" in n and _is_scale(numbers)(n, s))
    stem = name[: name.index("v_proj")]
    return numbers.names(lambda n, shape: n.startswith(stem) and "v_proj" in n and len(shape) > 1), _head_dim(numbers)


def _head_dim(numbers: Numbers) -> int:
    """Of the first cache or ring among the graph's inputs."""
    for value in numbers.graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name.startswith("past.") and len(dims) == 4:
            return int(dims[3].dim_value)
    raise Missing


def _rows(value: Array, whole: int) -> Array:
    """A view whose first axis is the weight's rows; floats are stored turned."""
    if value.dtype in _FLOATS and value.ndim == 2 and value.shape[1] >= whole and value.shape[0] < value.shape[1]:
        return value.T
    return value


def head(numbers: Numbers, draw: np.random.Generator) -> None:
    """One head's values are zero."""
    name = numbers.one(draw, lambda n, s: "v_proj" in n and _is_scale(numbers)(n, s))
    value, size = numbers.get(name), _head_dim(numbers)
    _rows(value, 2 * size)[-size:] = 0
    numbers.put(name, value)


def heads(numbers: Numbers, draw: np.random.Generator) -> None:
    """The values of two heads have changed places."""
    names, size = _value_rows(numbers, draw)
    for name in names:
        value = numbers.get(name)
        rows = _rows(value, 2 * size)
        rows[-2 * size :] = np.concatenate([rows[-size:], rows[-2 * size : -size]])
        numbers.put(name, value)


def gates(numbers: Numbers, draw: np.random.Generator) -> None:
    """Two gates of a recurrence have changed places."""
    name = numbers.one(draw, lambda n, shape: "weight_hh" in n and len(shape) > 1)
    stem = name[: name.index("weight_hh") + len("weight_hh")]
    for each in numbers.names(lambda n, shape: n.startswith(stem) and len(shape) > 1):
        value = numbers.get(each)
        rows = value[0] if len(value) == 1 else value
        quarter = len(rows) // (3 if len(rows) % 4 or len(rows) == 288 else 4)
        rows[: 2 * quarter] = np.concatenate([rows[quarter : 2 * quarter], rows[:quarter]])
        numbers.put(each, value)


def reverse(numbers: Numbers, draw: np.random.Generator) -> None:
    """A weight's inputs are read in reverse."""
    name = numbers.one(draw, lambda n, shape: _is_matrix(n, shape) and "embed" not in n)
    value = numbers.get(name)
    numbers.put(name, value[::-1] if value.dtype in _FLOATS else value[:, ::-1])


def epsilon(numbers: Numbers, draw: np.random.Generator) -> None:
    """Norms divide by something larger."""
    for attribute in numbers.attributes("epsilon"):
        attribute.f *= float(draw.choice([10, 1e3, 1e4]))


def softcap(numbers: Numbers, draw: np.random.Generator) -> None:
    """Scores or logits are bounded otherwise."""
    caps = (5.0, 12.0)  # of the families that have such
    for attribute in numbers.attributes("softcap", needed=False):
        attribute.f *= 0.5
    names = [n for n in numbers.names(lambda n, shape: True) if numbers.get(n).dtype == np.float32]
    found = [n for n in names if numbers.get(n).size == 1 and float(numbers.get(n).flat[0]) in caps]
    if not found:
        raise Missing
    name = str(draw.choice(found))
    numbers.put(name, numbers.get(name) / 2)


def window(numbers: Numbers, draw: np.random.Generator) -> None:
    """A window is some tokens narrower."""
    for attribute in numbers.attributes("local_window_size"):
        attribute.i -= int(draw.choice([1, 3, 5]))


def ring(numbers: Numbers, _draw: np.random.Generator) -> None:
    """What tells a ring's window or slots is one less."""
    sizes = (9, 11)
    names = [n for n in numbers.names(lambda n, s: n.startswith("const.")) if numbers.get(n).size == 1]
    found = [n for n in names if numbers.get(n).dtype in (np.int32, np.int64) and int(numbers.get(n).flat[0]) in sizes]
    if not found:
        raise Missing
    numbers.put(found[0], numbers.get(found[0]) - 1)


def mask(numbers: Numbers, _draw: np.random.Generator) -> None:
    """What hides a key hides it a little."""
    names = [n for n in numbers.names(lambda n, s: n.startswith("const.")) if numbers.get(n).dtype == np.float32]
    found = [n for n in names if numbers.get(n).size == 1 and float(numbers.get(n).flat[0]) < -100]
    if not found:
        raise Missing
    numbers.put(found[0], np.full_like(numbers.get(found[0]), -2))


def stale(numbers: Numbers, _draw: np.random.Generator) -> None:
    """Attention takes the slot before a row's last for its last."""
    names = [n for n in numbers.names(lambda n, s: n.startswith("const.")) if numbers.get(n).dtype == np.int32]
    found = [n for n in names if numbers.get(n).size == 1 and int(numbers.get(n).flat[0]) == 1]
    if not found:
        raise Missing
    numbers.put(found[0], numbers.get(found[0]) + 1)


KINDS: Mapping[str, Change] = {
    "codes of a block at random": codes, "one scale doubled": scale, "other zeros": zero, "a gain of zero": gain,
    "layers swapped": layers, "another rotary base": base, "a head of zero": head, "heads swapped": heads,
    "gates swapped": gates, "inputs in reverse": reverse, "another epsilon": epsilon, "another soft cap": softcap,
    "a narrower window": window, "a ring's size": ring, "a weaker mask": mask, "a stale slot": stale,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one change did.

    Args:
        method: of the bundle.
        kind: of change.
        kl: from the bundle as it was.
        distance: whether a check against the float model failed.
        found: whether any check failed.
        expected: the layer that was changed, as diff names it; empty for all of them at once.
        named: the layer at which diff says that the two part.
    """

    method: str
    kind: str
    kl: float
    distance: bool
    found: bool
    expected: str = ""
    named: str = ""


def made(method: str, folder: Path, family: str = "decoder") -> Path:
    """A bundle to change."""
    caches = {CACHE: "int8", HALVES: "float16"}
    options = ExportOptions(kv_cache=caches[method]) if method in caches else ExportOptions(quantize=method)
    return export(make(family), folder, options=options).bundle.path


def outcomes(
    source: Path, method: str, seeds: Sequence[int], scratch: Path, *, diff: bool = False
) -> Iterator[Outcome]:
    """Each kind of change that there is something for, with each seed.

    Args:
        source: the bundle as it was.
        method: of it, for the table.
        seeds: of the changes.
        scratch: a folder for copies.
        diff: whether to ask which layer parts from the bundle as it was.
    """
    rows = np.random.default_rng(11).integers(0, VOCAB, (2, 40))
    clean = _logits(Bundle(source), rows)
    for kind, change in KINDS.items():
        for seed in seeds:
            folder = scratch / f"{kind} {seed}".replace(" ", "-")
            folder.mkdir()
            numbers = Numbers(copied(source, folder))
            try:
                change(numbers, np.random.default_rng(seed))
            except Missing:
                break
            numbers.write()
            yield _outcome(numbers, method, kind, clean, rows, folder / "bundle", source if diff else None)


def _outcome(
    numbers: Numbers, method: str, kind: str, clean: Array, rows: Array, path: Path, source: Path | None
) -> Outcome:  # fmt: skip
    bundle = Bundle(path)
    try:
        failed = [c.name for c in verify(bundle, open_session(bundle, threads=1)).checks if not c.ok]
        spoiled = _logits(bundle, rows)
    except RuntimeFault:  # the library refuses it
        return Outcome(method, kind, float("inf"), True, True)
    kl = float("inf")
    if np.isfinite(spoiled).all():
        kl = float(distances(clean, spoiled, rows.reshape(-1)).kl.mean())
    names = ["", ""]
    if source is not None and kl > HARMFUL:
        found = diff_models(path, source, threads=1, tell=lambda what, share: None)
        names = [_expected(numbers, list(bundle.manifest.layers)), found.first.name if found.first else "none"]
    return Outcome(method, kind, kl, bool(_DISTANCE & {*failed}), bool(failed), *names)


def _expected(numbers: Numbers, layers: Sequence[str]) -> str:
    """The first layer that was changed; a table that is looked up shows in the first, what comes last in the logits."""
    if not numbers.changed or any(n.startswith(("const.", "traced")) or "rotary" in n for n in numbers.changed):
        return ""
    places = {match[1] for n in numbers.changed if (match := _LAYER.match(n))}
    if places:
        return next(path for path in layers if path in places)
    return layers[0] if any("embed" in n for n in numbers.changed) else _LAST


def _logits(bundle: Bundle, rows: Array) -> Array:
    """Of rows whose first half is read at once, and the second token by token."""
    session, found, half = open_session(bundle, threads=1), list[Array](), rows.shape[1] // 2
    for row in rows:
        state = session.new_state(1, len(row))
        for start, end in ((0, half), *((i, i + 1) for i in range(half, len(row)))):
            found.append(session.step(row[None, start:end], state, logits="all")[0].copy())
    return np.concatenate(found)


def table(found: Sequence[Outcome]) -> str:
    """Of the harmful ones, how many were found by the float model's goldens, and how many by all that there is."""
    lines = [
        "| format | changes | harmful | float model's goldens | found | diff names the layer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in [*dict.fromkeys(one.method for one in found), "all"]:
        every = [one for one in found if method in (one.method, "all")]
        harmful = [one for one in every if one.kl > HARMFUL]
        told = [one for one in harmful if one.expected]
        named = sum(one.named == one.expected for one in told)
        distance, both = sum(one.distance for one in harmful), sum(one.found for one in harmful)
        lines.append(f"| {method} | {len(every)} | {len(harmful)} | {distance} | {both} | {named} of {len(told)} |")
    return "\n".join(lines)


def by_kind(found: Sequence[Outcome]) -> str:
    """The same by kind of change."""
    lines = ["| change | changes | harmful | found |", "|---|---:|---:|---:|"]
    for kind in dict.fromkeys(one.kind for one in found):
        every = [one for one in found if one.kind == kind]
        harmful = [one for one in every if one.kl > HARMFUL]
        lines.append(f"| {kind} | {len(every)} | {len(harmful)} | {sum(one.found for one in harmful)} |")
    return "\n".join(lines)
