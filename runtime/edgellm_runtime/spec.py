"""The contract between a model, the exporter and the device: what a decoding step takes, gives and carries.

Standard library only, because the device reads it and the model declares with it. It describes; it runs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

__all__ = [
    "ADAPTER",
    "ADAPTER_NAME",
    "BATCH",
    "CAPACITY",
    "DTYPE_BYTES",
    "ENCODER_INPUTS",
    "HIDDEN",
    "PAST_LENGTHS",
    "SOURCE",
    "UPDATES",
    "Signature",
    "SpecError",
    "StateSpec",
    "TensorSpec",
    "Update",
    "adapter_spec",
]

BATCH = "batch"
CAPACITY = "capacity"
PAST_LENGTHS = "past_lengths"  # the input that says how many tokens rows already hold
SOURCE = "source"
HIDDEN = "hidden"  # the output of a graph that gives what its logits are projected from
Dim = int | str
Update = Literal["append", "ring", "replace", "static"]
UPDATES: tuple[str, ...] = get_args(Update)
DTYPE_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
ADAPTER = "adapter"  # the state that holds the number of each row's adapter, 0 for none
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


class SpecError(ValueError):
    """A specification that no graph could have: an unknown dtype, a nameless or misshapen tensor."""


def _check(name: str, shape: tuple[Dim, ...], dtype: str) -> None:
    if not _NAME.fullmatch(name):
        raise SpecError(f"tensor name {name!r} is not dotted words of letters, digits and '_'")
    if dtype not in DTYPE_BYTES:
        raise SpecError(f"{name}: unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    for dim in shape:
        if not (isinstance(dim, str) and dim.isidentifier()) and not (type(dim) is int and 0 < dim < 2**31):
            raise SpecError(f"{name}: dimension {dim!r} is neither a positive int nor a symbol")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph input or output: its name, its shape (ints and symbols) and its dtype."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check(self.name, self.shape, self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(data["name"], tuple(data["shape"]), data["dtype"])


ENCODER_INPUTS = (  # of the graph that reads sources; rows may be padded at the end
    TensorSpec("source", (BATCH, SOURCE), "int64"),
    TensorSpec("source_lengths", (BATCH,), "int32"),
)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor that a model carries from step to step.

    Args:
        name: dotted name, unique in the model, such as ``layers.0.k``. The graph's names derive from it.
        shape: ints and the symbols ``batch`` (first) and ``capacity`` (the axis that tokens fill).
        dtype: numpy's name for the element type.
        update: how a step changes it.

            ``append`` grows along the capacity axis, one slot a token (keys and values).
            ``ring`` has a fixed number of slots along ``axis``; token ``i`` of a row is in slot ``i % slots`` until
            token ``i + slots`` takes its place (keys and values of a sliding window).
            ``replace`` is wholly new after each step (a recurrence's h and c).
            ``static`` is made by a row's first step and handed through unchanged by all later ones (keys and values
            of cross-attention). It may depend on the row's first token alone, for a step may hold no more. One whose
            shape has the symbol ``source`` is made by the model's encoder instead, before the first step: see
            :attr:`encoded`.
        axis: of a ring, the one that its slots are along.
        window: of a ring, how many tokens a token sees of it, itself among them; at most the slots.
        source: of one that an encoder makes, the tokens of the longest source; None until there are sources.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    update: Update
    axis: int | None = None
    window: int | None = None
    source: int | None = None

    def __post_init__(self) -> None:
        _check(self.name, self.shape, self.dtype)
        if self.update not in UPDATES:
            raise SpecError(f"{self.name}: update {self.update!r} is none of {', '.join(UPDATES)}")
        if not self.shape or self.shape[0] != BATCH:
            raise SpecError(f"{self.name}: shape {self.shape} must begin with {BATCH!r}")
        symbols = [d for d in self.shape[1:] if isinstance(d, str)]
        expected = [CAPACITY] if self.update == "append" else []
        if symbols != expected and not self.encoded:
            raise SpecError(f"{self.name}: {self.update} state of shape {self.shape} must have symbols {expected}")
        if self.source is not None and not (self.encoded and type(self.source) is int and 0 < self.source < 2**31):
            raise SpecError(f"{self.name}: a source of {self.source!r} tokens for a state of shape {self.shape}")
        self._check_ring()

    def _check_ring(self) -> None:
        if self.update != "ring":
            if self.axis is not None or self.window is not None:
                raise SpecError(f"{self.name}: only a ring has an axis and a window, not a state of {self.update!r}")
            return
        if type(self.axis) is not int or not 0 < self.axis < len(self.shape):
            raise SpecError(f"{self.name}: axis {self.axis!r} is none of a ring of shape {self.shape} but {BATCH!r}")
        if type(self.window) is not int or not 0 < self.window <= self._slots:
            raise SpecError(f"{self.name}: window {self.window!r} is not from 1 to the ring's {self._slots} slots")

    @property
    def past_name(self) -> str:
        """The graph input that takes this state."""
        return f"past.{self.name}"

    @property
    def present_name(self) -> str:
        """The graph output that gives this state."""
        return f"present.{self.name}"

    @property
    def capacity_axis(self) -> int | None:
        """Which axis grows with the tokens, or None for a state of fixed size."""
        return self.shape.index(CAPACITY) if self.update == "append" else None

    @property
    def encoded(self) -> bool:
        """Whether the model's encoder makes it of a row's source: steps read it, and do not give it back."""
        return self.update == "static" and [d for d in self.shape[1:] if isinstance(d, str)] == [SOURCE]

    @property
    def in_place(self) -> bool:
        """Whether it is written, if at all, where a step reads it; otherwise past and present are different memory."""
        return self.update == "append" or self.encoded

    def of_source(self, tokens: int | None) -> StateSpec:
        """The same for sources of at most so many tokens; itself where no encoder makes it."""
        return replace(self, source=tokens) if self.encoded and self.source != tokens else self

    @property
    def _slots(self) -> int:
        """Of a ring."""
        assert self.axis is not None
        return int(self.shape[self.axis])

    def earliest(self, written: int) -> int:
        """The fewest tokens, above none, that a row can be rewound to by what this state still holds.

        Args:
            written: the most tokens that the row has held since it was empty.
        """
        if self.update == "replace":
            return written
        if self.update != "ring" or self.window is None:
            return 0
        before = self.window - 1  # tokens that a new one sees beside itself
        return written - self._slots + before if before and written > self._slots else 0

    def used(self, tokens: int) -> tuple[slice, ...]:
        """Where the slots in use are in a tensor of this state.

        Args:
            tokens: of the row that holds the most.
        """
        axis = self.axis if self.update == "ring" else self.capacity_axis
        if axis is None:
            return ()
        return (*[slice(None)] * axis, slice(0, min(tokens, self._slots) if self.update == "ring" else tokens))

    def resolve(self, batch: int, capacity: int) -> tuple[int, ...]:
        """The concrete shape for so many rows and slots; for sources of one token where it does not know them."""
        sizes = {BATCH: batch, CAPACITY: capacity, SOURCE: self.source or 1}
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, batch: int, capacity: int) -> int:
        """Bytes that this state takes for so many rows and slots."""
        return math.prod(self.resolve(batch, capacity)) * DTYPE_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "name": self.name, "shape": list(self.shape), "dtype": self.dtype, "update": self.update
        }  # fmt: skip
        own |= {} if self.source is None else {"source": self.source}
        return own | ({"axis": self.axis, "window": self.window} if self.update == "ring" else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StateSpec:
        shape, ring = tuple(data["shape"]), (data.get("axis"), data.get("window"))
        return cls(data["name"], shape, data["dtype"], data["update"], *ring)


def adapter_spec() -> StateSpec:
    """The state by which rows choose among a model's adapters; set before the first step, handed through by all."""
    return StateSpec(ADAPTER, (BATCH, 1), "int32", "static")


@dataclass(frozen=True, slots=True)
class Signature:
    """Everything a caller must know to run a graph: inputs and outputs besides the state, and the state."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]

    @property
    def logits(self) -> TensorSpec:
        """The output that every graph has, the first."""
        return self.outputs[0]

    @property
    def hidden(self) -> TensorSpec | None:
        """The last hidden state of every new token, (batch, time, features) in float32; None: no graph gives it."""
        return next((spec for spec in self.outputs[1:] if spec.name == HIDDEN), None)

    @property
    def encoded(self) -> tuple[StateSpec, ...]:
        """The states that an encoder makes; none: the model reads no source."""
        return tuple(spec for spec in self.state if spec.encoded)

    @property
    def carried(self) -> tuple[StateSpec, ...]:
        """The states that a step gives anew."""
        return tuple(spec for spec in self.state if not spec.encoded)

    @property
    def one_pass(self) -> bool:
        """Whether a row is read in one step, since its tokens see those after them: there is no past to speak of."""
        return not self.state and all(t.name != PAST_LENGTHS for t in self.inputs)

    @property
    def encoder(self) -> Signature:
        """What the graph of the encoder takes and gives."""
        outputs = tuple(TensorSpec(spec.present_name, spec.shape, spec.dtype) for spec in self.encoded)
        return Signature(ENCODER_INPUTS, outputs, ())

    def __post_init__(self) -> None:
        names = [t.name for t in (*self.inputs, *self.outputs)] + [s.name for s in self.state]
        if len(names) != len(set(names)):
            raise SpecError(f"names in a signature must be unique: {sorted(names)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "state": [s.to_json() for s in self.state],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        return cls(
            tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            tuple(TensorSpec.from_json(t) for t in data["outputs"]),
            tuple(StateSpec.from_json(s) for s in data["state"]),
        )
