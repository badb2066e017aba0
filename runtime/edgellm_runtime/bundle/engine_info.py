"""What a manifest says of engines: what each was built from and with. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.graphs.token_choice import MOST

__all__ = [
    "CHOOSE",
    "ENCODE",
    "LIBRARIES",
    "ROLES",
    "ChooserInfo",
    "EngineInfo",
    "GraphInfo",
    "Range",
]

LIBRARIES = ("tensorrt", "tensorrt_rtx")
ROLES, CHOOSE = ("prefill", "decode"), "choose"  # roles of graphs that step, and of engines beside them
ENCODE = "encode"
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_MOST = 2**31


@dataclass(frozen=True)
class GraphInfo:
    """One graph of a bundle that has one for each role.

    Args:
        file: its name in the bundle.
        time: tokens of each row in a step; shorter rows are padded at the end.
    """

    file: str
    time: int

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "time": self.time}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GraphInfo:
        file = _text(data["file"])
        if not file.endswith(".onnx"):  # ONNX Runtime takes others for formats of its own, which nobody checks
            raise ValueError(f"graph {file!r} is not named as one")
        return cls(file, _size(data["time"]))


@dataclass(frozen=True)
class Range:
    """The shapes of one input that an engine takes: the smallest, the one it is fastest for, the largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def to_json(self) -> dict[str, list[int]]:
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Range:
        found = cls(*(tuple(_size(n) for n in _list(data[k])) for k in ("min", "opt", "max")))
        if not len(found.min) == len(found.opt) == len(found.max) or not all(
            a <= b <= c for a, b, c in zip(found.min, found.opt, found.max, strict=True)
        ):
            raise ValueError(f"a range from {found.min} over {found.opt} to {found.max}")
        return found


@dataclass(frozen=True)
class EngineInfo:
    """One engine and its fingerprint.

    Args:
        role: which graph it was built from; :data:`ENCODE` for the encoder's, :data:`CHOOSE` for one that chooses
            tokens.
        file: its name in the bundle.
        library: one of :data:`LIBRARIES`.
        library_version: the library's whole version.
        compute_capabilities: of the GPUs that it was built for, such as ``8.6``.
        precision: of activations and state.
        profile: input name to the shapes that it takes.
        graph_sha256: of the graph that it was built from.
    """

    role: str
    file: str
    library: str
    library_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    profile: Mapping[str, Range]
    graph_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {
            "role": self.role, "file": self.file, "library": self.library, "library_version": self.library_version,
            "compute_capabilities": list(self.compute_capabilities), "precision": self.precision,
            "profile": {name: shapes.to_json() for name, shapes in self.profile.items()},
            "graph_sha256": self.graph_sha256,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], roles: Sequence[str] = ROLES) -> EngineInfo:
        """Read what a manifest says of an engine of one of some roles.

        Raises:
            ValueError: a role, library or capability that there is none of, or a range that is none.
        """
        role, library = _text(data["role"]), _text(data["library"])
        if role not in roles or library not in LIBRARIES:
            raise ValueError(f"an engine of role {role!r} for library {library!r}")
        capabilities = tuple(_text(c) for c in _list(data["compute_capabilities"]))
        if not capabilities or not all(_CAPABILITY.fullmatch(c) for c in capabilities):
            raise ValueError(f"compute capabilities {list(capabilities)}")
        profile = {_text(name): Range.from_json(shapes) for name, shapes in dict(data["profile"]).items()}
        texts = (_text(data[key]) for key in ("library_version", "precision", "graph_sha256"))
        version, precision, digest = texts
        return cls(role, _text(data["file"]), library, version, capabilities, precision, profile, digest)


@dataclass(frozen=True)
class ChooserInfo:
    """An engine that chooses the best tokens of each row where the logits are.

    Args:
        count: how many of a row.
        engine: its fingerprint.
    """

    count: int
    engine: EngineInfo

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, **self.engine.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], width: int) -> ChooserInfo:
        """Read what a manifest says.

        Args:
            data: of one entry.
            width: of the logits.

        Raises:
            ValueError: more tokens than there are, and what :meth:`EngineInfo.from_json` refuses.
        """
        count = _size(data["count"])
        if count > min(width, MOST):
            raise ValueError(f"a choice of {count} of {width} logits")
        return cls(count, EngineInfo.from_json(data, (CHOOSE,)))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is not a text")
    return value


def _list(value: Any) -> Sequence[Any]:
    if type(value) is not list:
        raise ValueError(f"{value!r} is not a list")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 < value < _MOST:
        raise ValueError(f"{value!r} is not a size")
    return value
