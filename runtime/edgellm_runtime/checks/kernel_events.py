"""What ONNX Runtime's profiler wrote: the kernels of each run of a graph, and the node that each of them runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_runtime.errors import BackendError
from edgellm_runtime.graphs.layer_map import GraphNode

__all__ = ["Kernel", "Run", "node_of", "read_runs", "runs_of"]

_KERNEL, _RUN = "_kernel_time", "model_run"
_WORD = re.compile(r"\w")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One kernel of one run.

    Args:
        name: of the node that ONNX Runtime runs, which may be one that it has put in the place of several.
        op: the operator's name.
        index: of that node in ONNX Runtime's graph, or of the engine that it is in; None where that is not told.
        start_us: microseconds from the start of the profile.
        us: how long it took.
        given: shapes of its inputs, without those that its kernel holds packed.
        made: shapes of its outputs.
        activation_bytes: of inputs that are no weights.
        output_bytes: of its outputs.
        parameter_bytes: of weights, without those that its kernel holds packed.
    """

    name: str
    op: str
    index: int | None
    start_us: float
    us: float
    given: tuple[Shape, ...] = ()
    made: tuple[Shape, ...] = ()
    activation_bytes: int = 0
    output_bytes: int = 0
    parameter_bytes: int = 0

    @property
    def end_us(self) -> float:
        return self.start_us + self.us

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells it from other kernels of its graph."""
        return self.name, self.index


@dataclass(frozen=True)
class Run:
    """One run of a graph, and its kernels in their order; those inside of another kernel are part of that one."""

    start_us: float
    us: float
    kernels: tuple[Kernel, ...]


def read_runs(file: Path) -> list[Run]:
    """The runs in a profile, which has an event in each line and may have hundreds of megabytes of them.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return runs_of(json.loads(text) for line in lines if (text := line.strip(" \n\r,")) not in ("", "[", "]"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackendError(f"ONNX Runtime's profile cannot be read ({error}); profile with another version") from error


def runs_of(events: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs among a profile's events."""
    spans: list[tuple[float, float]] = []
    kernels: list[Kernel] = []
    for event in events:
        if event.get("name") == _RUN:
            spans.append((float(event["ts"]), float(event["dur"])))
        elif event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            kernels.append(_kernel(event))
    kernels = _outermost(sorted(kernels, key=lambda k: (k.start_us, -k.us)))
    found, at = [], 0
    for start, us in sorted(spans):
        while at < len(kernels) and kernels[at].start_us < start:  # of no run: constants that were folded
            at += 1
        first = at
        while at < len(kernels) and kernels[at].start_us <= start + us:
            at += 1
        found.append(Run(start, us, tuple(kernels[first:at])))
    return found


def _outermost(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Kernels in their order, those left out that run inside of another, such as a loop's."""
    found: list[Kernel] = []
    for kernel in kernels:
        if not (found and kernel.start_us < found[-1].end_us and kernel.end_us <= found[-1].end_us):
            found.append(kernel)
    return found


def _kernel(event: Mapping[str, Any]) -> Kernel:
    args = event["args"]
    index = str(args.get("node_index", ""))
    return Kernel(
        event["name"].removesuffix(_KERNEL), str(args["op_name"]), int(index) if index.isdecimal() else None,
        float(event["ts"]), float(event["dur"]), _shapes(args.get("input_type_shape")),
        _shapes(args.get("output_type_shape")),
        *(int(args.get(f"{what}_size") or 0) for what in ("activation", "output", "parameter")),
    )  # fmt: skip


def _shapes(given: Any) -> tuple[Shape, ...]:
    return tuple(tuple(map(int, shape)) for each in given or () for shape in each.values())


def node_of(kernel: Kernel, nodes: Sequence[GraphNode], names: Counter[str]) -> int | None:
    """Which node of a graph a kernel runs; None where that cannot be told.

    A node that ONNX Runtime left as it was keeps its place and its name. What it put in the place of some nodes begins
    with the name of one of them.

    Args:
        kernel: of a run.
        nodes: of the graph.
        names: how many nodes have each name.
    """
    if kernel.index is not None and kernel.index < len(nodes) and nodes[kernel.index].name == kernel.name:
        return kernel.index
    fitting = [
        name for name, count in names.items()
        if name and count == 1 and kernel.name.startswith(name) and not _WORD.match(kernel.name[len(name) :])
    ]  # fmt: skip
    longest = max(fitting, key=len, default=None)
    return next((i for i, node in enumerate(nodes) if node.name == longest), None) if longest else None
