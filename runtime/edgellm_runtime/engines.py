"""Engines in a bundle: what each was built with, and whether it may run here. Standard library only.

An engine is machine code for one kind of GPU and one version of one library, made from a graph of the bundle. It is
never run on trust: where anything differs it is refused, with the command that builds it again from the graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm_runtime.choosing import MOST, choosing_digest
from edgellm_runtime.errors import BundleError

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle, Manifest

__all__ = [
    "CHOOSE",
    "LIBRARIES",
    "ROLES",
    "ChooserInfo",
    "EngineInfo",
    "GraphInfo",
    "Range",
    "check_engine",
    "choosers_here",
    "current_compute_capability",
]

LIBRARIES = ("tensorrt", "tensorrt_rtx")
ROLES, CHOOSE = ("prefill", "decode"), "choose"
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
        return cls(_text(data["file"]), _size(data["time"]))


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
        role: which graph it was built from; :data:`CHOOSE` for one that chooses tokens.
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


def check_engine(
    bundle: Bundle, role: str, *, library: str, version: str, compute_capability: str
) -> EngineInfo:  # fmt: skip
    """The engine of a role that runs here.

    Args:
        bundle: opened.
        role: ``prefill`` or ``decode``.
        library: what is installed here, one of :data:`LIBRARIES`.
        version: its version.
        compute_capability: of the GPU here, such as ``8.6``.

    Raises:
        BundleError: there is none for this library, version and GPU, or it was built from another graph; the text says
            what differs and how to build it here.
    """
    manifest, remedy = bundle.manifest, f"build it here: edgellm build {bundle.path}"
    if role not in manifest.graphs:
        raise BundleError(f"{bundle.path}: is for target {manifest.target['name']}, which has no engines; "
                          "export the model with --target tensorrt")  # fmt: skip
    of_role = [engine for engine in manifest.engines if engine.role == role]
    engines = [engine for engine in of_role if engine.library == library]
    if not engines:
        others = sorted({engine.library for engine in of_role})
        had = f"only one for {' and '.join(others)}" if others else "none"
        raise BundleError(f"{bundle.path}: needs a {role} engine for {library}, but holds {had}; {remedy}")
    digest = manifest.files[manifest.graphs[role].file].sha256
    faults = [_fault(engine, digest, manifest.dtype, version, compute_capability) for engine in engines]
    if None in faults:
        return engines[faults.index(None)]
    raise BundleError(f"{bundle.path}: {engines[0].file} {faults[0]}; {remedy}")


def choosers_here(
    manifest: Manifest, *, library: str, version: str, compute_capability: str
) -> tuple[dict[int, ChooserInfo], str]:
    """The engines that choose tokens and run here, by how many they choose.

    Returns:
        Those, and if there is none for the best token alone, nothing and why: several come from a sort, whose order
        among equals is not the host's. A bundle without them runs all the same, and its logits are fetched.
    """
    found: dict[int, ChooserInfo] = {}
    why = "the bundle has no engine that chooses the best token; edgellm build makes it"
    for chooser in manifest.choosers:
        engine = chooser.engine
        fault = f"is for {engine.library}" if engine.library != library else _fault(
            engine, choosing_digest(manifest.width, chooser.count), "float32", version, compute_capability
        )  # fmt: skip
        if fault is None:
            found[chooser.count] = chooser
        else:
            why = f"{engine.file} {fault}"
    return (found, "") if 1 in found else ({}, why)


def _fault(engine: EngineInfo, graph_sha256: str, dtype: str, version: str, capability: str) -> str | None:
    if engine.graph_sha256 != graph_sha256:
        return "was built from another graph than the one beside it"
    if engine.precision != dtype:
        return f"computes in {engine.precision}, the bundle in {dtype}"
    if engine.library_version != version:
        return f"was built by {engine.library} {engine.library_version}, here is {version}"
    if capability not in engine.compute_capabilities:
        return (
            f"was built for compute capability {', '.join(engine.compute_capabilities)}, the GPU here has {capability}"
        )
    return None


def current_compute_capability() -> str | None:
    """That of the first GPU as its driver tells, such as ``8.6``; None where there is no driver or no GPU."""
    import ctypes  # few programs ask

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, found = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(found, (75, 76), strict=True):  # the major and the minor number
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"{found[0].value}.{found[1].value}"


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
