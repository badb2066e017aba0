"""Bundles whose numbers someone has changed, checksums rewritten: which of the changes that matter does verify find?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from families import VOCAB, make
from numpy.typing import NDArray
from tiny_files import copied, sign

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.evaluate import distances
from edgellm_runtime.checks.verify import EXACT, verify

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
HEAD_DIM = 32
HARMFUL = 1e-4  # of the KL divergence from the bundle as it was, nats a token
Array = NDArray[Any]
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16}


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

    def names(self, holds: Callable[[str, tuple[int, ...]], bool]) -> list[str]:
        """Tensors whose name and shape a condition holds for."""
        return sorted(name for name, i in self._found.items() if holds(name, tuple(i.dims)))

    def get(self, name: str) -> Array:
        """A copy of a tensor."""
        tensor = self._found[name]
        start, length = self._place(tensor)
        raw = self._data[start : start + length] if length else tensor.raw_data
        return np.frombuffer(bytes(raw), _TYPES[tensor.data_type]).reshape(tensor.dims).copy()

    def put(self, name: str, value: Array) -> None:
        """Give a tensor other numbers of its shape and type."""
        tensor = self._found[name]
        start, length = self._place(tensor)
        raw = value.astype(_TYPES[tensor.data_type]).tobytes()
        if length:
            self._data[start : start + length] = raw
        else:
            tensor.raw_data = raw

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


def _matrices(numbers: Numbers) -> list[str]:
    ends = (".scales", ".zeros", ".table")
    return numbers.names(lambda n, shape: len(shape) > 1 and "rotary" not in n and not n.endswith(ends))


def _scales(numbers: Numbers) -> list[str]:
    return numbers.names(lambda n, _: n.endswith(".scales")) or _matrices(numbers)


def codes(numbers: Numbers, draw: np.random.Generator) -> None:
    """Some of a weight's numbers in any order, or any codes instead."""
    name = draw.choice(_matrices(numbers))
    flat = (whole := numbers.get(name)).reshape(-1)
    size = len(flat) // 16
    start = int(draw.integers(0, len(flat) - size))
    part = flat[start : start + size]
    part[:] = draw.permutation(part) if part.dtype == np.float32 else draw.integers(0, 256, size).astype(part.dtype)
    numbers.put(name, whole)


def scale(numbers: Numbers, draw: np.random.Generator) -> None:
    """One scale is doubled; of float weights, one row."""
    name = draw.choice(_scales(numbers))
    value = numbers.get(name)
    row = int(draw.integers(0, len(value)))
    if value.dtype == np.float32:
        value[row] *= 2
    else:
        value[row, int(draw.integers(0, value.shape[1]))] *= 2
    numbers.put(name, value)


def gain(numbers: Numbers, draw: np.random.Generator) -> None:
    """A norm's gain is zero."""
    name = draw.choice(numbers.names(lambda n, shape: "norm" in n and len(shape) == 1))
    numbers.put(name, numbers.get(name) * 0)


def layers(numbers: Numbers, _draw: np.random.Generator) -> None:
    """Two layers have changed places."""
    for name in numbers.names(lambda n, _: n.startswith("layers.0.")):
        other = name.replace("layers.0.", "layers.1.", 1)
        mine, theirs = numbers.get(name), numbers.get(other)
        numbers.put(name, theirs)
        numbers.put(other, mine)


def base(numbers: Numbers, draw: np.random.Generator) -> None:
    """Positions are rotated with another base."""
    cos, sin = numbers.get("rotary.cos"), numbers.get("rotary.sin")
    frequency = np.arctan2(sin[1], cos[1]) ** draw.choice([0.5, 0.8, 0.95, 1.05, 1.3])
    angle = np.arange(len(cos))[:, None] * frequency
    numbers.put("rotary.cos", np.cos(angle))
    numbers.put("rotary.sin", np.sin(angle))


def head(numbers: Numbers, draw: np.random.Generator) -> None:
    """One head's values are zero."""
    name = draw.choice([n for n in _scales(numbers) if "v_proj" in n])
    value = numbers.get(name)
    rows = value if value.shape[0] >= value.shape[1] else value.T
    rows[-HEAD_DIM:] = 0
    numbers.put(name, value)


def epsilon(numbers: Numbers, draw: np.random.Generator) -> None:
    """Norms divide by something larger."""
    for node in numbers.graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f *= float(draw.choice([10, 1e3, 1e4]))


KINDS: Mapping[str, Change] = {
    "codes of a block at random": codes, "one scale doubled": scale, "a gain of zero": gain, "layers swapped": layers,
    "another rotary base": base, "a head of zero": head, "another epsilon": epsilon,
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
    """

    method: str
    kind: str
    kl: float
    distance: bool
    found: bool


def made(method: str, folder: Path, family: str = "decoder") -> Path:
    """A bundle to change."""
    return export(make(family), folder, options=ExportOptions(quantize=method)).bundle.path


def outcomes(source: Path, method: str, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """Each kind of change with each seed."""
    rows = np.random.default_rng(11).integers(0, VOCAB, (2, 40))
    clean = _logits(Bundle(source), rows)
    for kind, change in KINDS.items():
        for seed in seeds:
            folder = scratch / f"{kind} {seed}".replace(" ", "-")
            folder.mkdir()
            numbers = Numbers(copied(source, folder))
            change(numbers, np.random.default_rng(seed))
            numbers.write()
            bundle = Bundle(folder / "bundle")
            failed = [c.name for c in verify(bundle, open_session(bundle, threads=1)).checks if not c.ok]
            spoiled = _logits(bundle, rows)
            kl = float("inf")
            if np.isfinite(spoiled).all():
                kl = float(distances(clean, spoiled, rows.reshape(-1)).kl.mean())
            yield Outcome(method, kind, kl, any(not n.startswith(f"{EXACT}.") for n in failed), bool(failed))


def _logits(bundle: Bundle, rows: Array) -> Array:
    session = open_session(bundle, threads=1)
    found = [session.step(row[None], session.new_state(1, len(row)), logits="all")[0].copy() for row in rows]
    return np.concatenate(found)


def table(found: Sequence[Outcome]) -> str:
    """Of the harmful ones, how many were found by the float model's goldens, and how many by both references."""
    lines = ["| format | change | harmful | float model's goldens | both references |", "|---|---|---:|---:|---:|"]
    for method in dict.fromkeys(one.method for one in found):
        harmful = [one for one in found if one.method == method and one.kl > HARMFUL]
        for kind in (*KINDS, "all"):
            group = [one for one in harmful if kind in (one.kind, "all")]
            distance, both = sum(one.distance for one in group), sum(one.found for one in group)
            lines.append(f"| {method} | {kind} | {len(group)} | {distance} | {both} |")
    return "\n".join(lines)
