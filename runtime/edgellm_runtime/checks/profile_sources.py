"""Who tells what kernels take: ONNX Runtime's profiler for its graph, TensorRT's for its engines."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from edgellm_runtime.backends.tensorrt import EngineRun, TensorRTBackend
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.kernel_events import Kernel, Run, node_of, read_runs
from edgellm_runtime.checks.layers import LAYER
from edgellm_runtime.checks.traffic import GraphTraffic, Step, Traffic
from edgellm_runtime.errors import BackendError
from edgellm_runtime.graphs.layer_map import EMBEDDING, HEAD, SHARED, graph_nodes, layer_map
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.loading import device_of, open_profiled
from edgellm_runtime.session import Session

__all__ = ["NOT_KNOWN", "Source", "View", "check_bundle", "open_source"]

NOT_KNOWN = "not known"
_BLOCKING = "CUDA_LAUNCH_BLOCKING"
_NAME = re.compile(r"[A-Za-z_]\w*")


class View(Protocol):
    """What a bundle's graphs tell of the kernels that ran."""

    @property
    def layer_of(self) -> Mapping[tuple[str, int | None], str]:
        """The layer of each kernel, by its key."""
        ...

    def sizes(self) -> dict[str, int]:
        """The layers in the model's order, and how many nodes of the graphs each has."""
        ...

    def traffic(self, kernel: Kernel, step: Step) -> Traffic | None:
        """The least that a kernel must do; None where that is not known."""
        ...


class Source(Protocol):
    """A session of which each kernel is timed."""

    session: Session
    tells_runs: bool  # whether the library tells how long a run was, beside its kernels

    def runs(self) -> list[Run]:
        """All runs until now; asked for once, at the end."""
        ...

    def view(self, runs: Sequence[Run]) -> View:
        """What the graphs tell of those runs' kernels."""
        ...


def check_bundle(path: str | Path, device: str) -> None:
    """Make sure that a bundle can be profiled there, before any work.

    Raises:
        BackendError: it cannot.
    """
    bundle = Bundle(path, checksums=False)
    where = device_of(bundle, device)
    if bundle.manifest.encoder is not None:
        raise BackendError(f"{path}: answers sources, and profiles are of models that go on with texts; use bench")
    if where == "cpu" and bundle.manifest.graphs:
        raise BackendError(
            f"{path}: was exported for engines, and on the CPU its graphs run only to be checked; profile a bundle for "
            "target cpu, or this one on device 'tensorrt'"
        )
    if where == "cuda" and os.environ.get(_BLOCKING) != "1":
        raise BackendError(
            f"{path}: ONNX Runtime does not wait for its kernels on a GPU, so that their times are not known; set "
            f"{_BLOCKING}=1, with which each is waited for, or use NVIDIA's Nsight Systems"
        )


def open_source(bundle: Bundle, scratch: Path, *, device: str, threads: int, kernels: str | None = None) -> Source:
    """A session whose kernels are timed.

    Args:
        bundle: opened, of those that :func:`check_bundle` lets pass.
        scratch: an empty folder, for files until the profile is read.
        device: as :func:`edgellm_runtime.load` takes it.
        threads: of the CPU.
        kernels: as :func:`edgellm_runtime.load` takes them.
    """
    session, backend = open_profiled(bundle, scratch / "run", device=device, threads=threads, kernels=kernels)
    if isinstance(backend, TensorRTBackend):
        return _Engines(bundle, session, backend)
    return _OneGraph(bundle, session, backend)


class _Profiled(Protocol):
    def end_profile(self) -> Path: ...


class _OneGraph:
    """Follows :class:`Source` for ONNX Runtime."""

    tells_runs = True

    def __init__(self, bundle: Bundle, session: Session, backend: _Profiled) -> None:
        self.session, self._bundle, self._backend = session, bundle, backend

    def runs(self) -> list[Run]:
        return read_runs(self._backend.end_profile())

    def view(self, runs: Sequence[Run]) -> View:
        graph, own = self._bundle.read(GRAPH), self.session.kernels
        return _GraphView(self._bundle, graph if own is None else own.swapped(graph)[0], runs)


class _GraphView:
    """Follows :class:`View`: kernels run nodes of one graph, or what ONNX Runtime has put in their place."""

    def __init__(self, bundle: Bundle, graph: bytes, runs: Sequence[Run]) -> None:
        model = read_model(graph)
        self._nodes = graph_nodes(model)
        self._layers = layer_map(model, bundle.manifest.layers, LAYER)
        names = Counter(node.name for node in self._nodes)
        kernels = {kernel.key: kernel for run in runs for kernel in run.kernels}
        self._place = {key: node_of(kernel, self._nodes, names) for key, kernel in kernels.items()}
        ran = {place for place in self._place.values() if place is not None}
        self._traffic = GraphTraffic(model, self._nodes, bundle.manifest.signature.state, ran)
        self.layer_of = {k: NOT_KNOWN if place is None else self._layers[place] for k, place in self._place.items()}

    def sizes(self) -> dict[str, int]:
        return _in_order(self._layers, NOT_KNOWN in self.layer_of.values())

    def traffic(self, kernel: Kernel, step: Step) -> Traffic | None:
        return self._traffic.of(kernel, self._place[kernel.key], step)


class _Engines:
    """Follows :class:`Source` for TensorRT, which names an engine's layers after the nodes that it has put in them."""

    tells_runs = False

    def __init__(self, bundle: Bundle, session: Session, backend: TensorRTBackend) -> None:
        self.session, self._noted = session, backend.time_layers()
        self._layers: list[str] = []
        self._nodes: dict[str, dict[str, tuple[str, str]]] = {}  # of each role, by a node's name: operator and layer
        for role, graph in bundle.manifest.graphs.items():
            model = read_model(bundle.read(graph.file))
            layers = layer_map(model, bundle.manifest.layers, LAYER)
            self._layers += layers
            nodes = zip(graph_nodes(model), layers, strict=True)
            self._nodes[role] = {node.name: (node.op, layer) for node, layer in nodes if node.name}

    def runs(self) -> list[Run]:
        roles, found, now = list(self._nodes), [], 0.0
        for noted in self._noted:
            start, kernels = now, []
            for name, ms in noted.layers:
                op, _ = self._inside(noted, name)
                kernels.append(Kernel(name, op, roles.index(noted.role), now, 1e3 * ms))
                now = kernels[-1].end_us
            found.append(Run(start, now - start, tuple(kernels)))
        return found

    def view(self, runs: Sequence[Run]) -> View:
        roles = list(self._nodes)
        keys = {kernel.key for run in runs for kernel in run.kernels}
        return _EngineView(
            {key: self._inside(EngineRun(roles[key[1] or 0]), key[0])[1] for key in keys}, self._layers
        )  # fmt: skip

    def _inside(self, noted: EngineRun, name: str) -> tuple[str, str]:
        """Operators and layer of what a layer of an engine holds, where its name says it."""
        nodes = self._nodes[noted.role]
        held = [nodes[word] for word in _NAME.findall(name) if word in nodes]
        layers = {layer for _, layer in held}
        ops = " + ".join(dict.fromkeys(op for op, _ in held)) if "..." not in name else ""  # which tells the ends only
        return ops or NOT_KNOWN, layers.pop() if len(layers) == 1 else NOT_KNOWN


class _EngineView:
    """Follows :class:`View`: what an engine moves is not known, for it may hold weights in other forms."""

    def __init__(self, layer_of: Mapping[tuple[str, int | None], str], layers: Sequence[str]) -> None:
        self.layer_of: Mapping[tuple[str, int | None], str] = layer_of
        self._layers = layers

    def sizes(self) -> dict[str, int]:
        return _in_order(self._layers, NOT_KNOWN in self.layer_of.values())

    def traffic(self, kernel: Kernel, step: Step) -> Traffic | None:
        return None


def _in_order(layers: Sequence[str], with_unknown: bool) -> dict[str, int]:
    """Layers from the embedding to the head, and how often each is there."""
    counts = Counter(layers)
    inner = [layer for layer in counts if layer not in (SHARED, EMBEDDING, HEAD)]
    found = {layer: counts[layer] for layer in (SHARED, EMBEDDING, *inner, HEAD) if layer in counts}
    return found | ({NOT_KNOWN: 0} if with_unknown else {})
