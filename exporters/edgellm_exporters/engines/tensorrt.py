"""Engines from a bundle's graphs, with TensorRT or TensorRT for RTX, whichever is installed; RTX's need no GPU.

The two share nearly all names; what this module asks of them is listed in :data:`API`. A graph that parses may still
not build, and one that builds may compute something else, so each network is read back before it becomes an engine.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.parser_check import Facts, check_parsed
from edgellm_exporters.engines.timing_cache import TimingCache
from edgellm_exporters.errors import EngineError
from edgellm_runtime.backends.engine_fit import current_compute_capability
from edgellm_runtime.bundle import FileInfo, Manifest, sha256_of
from edgellm_runtime.bundle.engine_info import CHOOSE, ENCODE, LIBRARIES, ChooserInfo, EngineInfo, Range
from edgellm_runtime.graphs.token_choice import choosing_graph

__all__ = [
    "API",
    "BuilderLibrary",
    "add_engines",
    "build_engine",
    "check_engine_options",
    "chosen_counts",
    "find_library",
    "profile_of",
]

# Every name of the libraries that is used here and in the runtime's backend for building; held against the installed
# library by a test, and against NVIDIA's documentation in tests/data/tensorrt_api.json.
API: Mapping[str, Sequence[str]] = {
    "": ("Builder", "ILogger", "IProgressMonitor", "LayerType", "Logger", "MemoryPoolType", "OnnxParser"),
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "INetworkDefinition": ("get_input", "get_layer", "get_output", "num_inputs", "num_layers", "num_outputs"),
    "IBuilderConfig": ("add_optimization_profile", "progress_monitor", "set_memory_pool_limit"),
    "IOptimizationProfile": ("set_shape",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "IAttention": ("causal_kind", "decomposable", "mask"),
    "IAttentionInputLayer": ("attention",),
    "IHostMemory": ("nbytes",),
}  # fmt: skip
RTX_API: Mapping[str, Sequence[str]] = {
    "": ("ComputeCapability",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
}  # fmt: skip
Progress = Callable[[str, float], None]  # what is being done, and how much of it (0 to 1)
_NOTHING: Mapping[str, Any] = {}
_NO_SOURCES: Mapping[str, int] = {}
_USUAL_SOURCE = 64  # tokens: the length that engines are fastest for, if a source may be as long
_CANDIDATES = 64  # as many as the CUDA target chooses on the GPU
_LEAST_CAPABILITY = {"fp8": "8.9"}  # by method; for older GPUs the library refuses the graph when it builds
_CAPABILITY = re.compile(r"\d{1,2}\.\d")


@dataclass(frozen=True)
class BuilderLibrary:
    """An installed library.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        module: what was imported.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        """Its whole version, which an engine is bound to."""
        return str(self.module.__version__)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities that it builds for without such a GPU; empty: only for the GPU that is here."""
        if self.name != "tensorrt_rtx":
            return ()
        names = re.findall(r"\bSM(\d+)\b", " ".join(dir(self.module.ComputeCapability)))
        return tuple(f"{n[:-1]}.{n[-1]}" for n in sorted(names, key=int))


def find_library() -> BuilderLibrary:
    """TensorRT if it is installed, else TensorRT for RTX.

    Raises:
        EngineError: neither is.
    """
    for name in LIBRARIES:
        try:
            return BuilderLibrary(name, importlib.import_module(name))
        except ImportError:
            continue
    raise EngineError(
        "neither tensorrt nor tensorrt_rtx is installed, and one of them builds engines; pip install "
        "tensorrt-rtx cuda-bindings, or leave the engines to 'edgellm build' on the device: --no-engine"
    )


def check_engine_options(
    options: EngineOptions, quantization: Mapping[str, Any] = _NOTHING
) -> tuple[BuilderLibrary, tuple[str, ...]] | None:
    """The library and the compute capabilities to build for, before any work; None if nothing is to be built.

    Args:
        options: what to build for.
        quantization: its ``method``; some need newer GPUs.

    Raises:
        EngineError: no library, no GPU to build for, or capabilities that it cannot build for.
    """
    if not options.build:
        return None
    for wanted in options.compute_capabilities:
        if not _CAPABILITY.fullmatch(wanted):
            raise EngineError(
                f"compute capability {wanted!r}; write it as NVIDIA does, major.minor, several as 8.6,8.9"
            )
    library, here = find_library(), current_compute_capability()
    able = library.capabilities or ((here,) if here else ())
    wanted_all = options.compute_capabilities or ((here,) if here else ())
    if not wanted_all:
        choice = f"--compute-capability with some of {', '.join(able)}, or " if able else ""
        raise EngineError(f"there is no GPU here to build engines for; give {choice}--no-engine, and run "
                          "'edgellm build' on the device")  # fmt: skip
    if foreign := [c for c in wanted_all if c not in able]:
        raise EngineError(
            f"{library.name} {library.version} builds no engines for compute capability {', '.join(foreign)} here; it "
            f"builds for {', '.join(able) or 'no other GPU than one that is here'}"
        )
    least = _LEAST_CAPABILITY.get(str(quantization.get("method")), "0.0")
    if older := [c for c in wanted_all if _number(c) < _number(least)]:
        raise EngineError(
            f"{quantization['method']} needs compute capability {least}, and {', '.join(older)} has no such numbers; "
            "choose another quantization"
        )
    return library, wanted_all


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def profile_of(
    inputs: Mapping[str, Sequence[int]], max_batch: int, time: int, *, sources: Mapping[str, int] = _NO_SOURCES,
    max_source: int = 1,
) -> dict[str, Range]:  # fmt: skip
    """The shapes that an engine takes: one row to ``max_batch``, and logits of one position to all.

    Args:
        inputs: the network's inputs with their shapes, -1 where a size is free.
        max_batch: the most rows.
        time: tokens of a step, the most positions that logits may be asked for.
        sources: inputs that are as long as the longest source, and the axis along which they are.
        max_source: the most tokens of one.
    """
    found = {}
    for name, shape in inputs.items():
        sizes = {axis: max_batch if axis == 0 else time for axis, size in enumerate(shape) if size < 0}
        least = [1 if axis in sizes else size for axis, size in enumerate(shape)]
        usual = list(least)
        if (along := sources.get(name)) is not None:
            sizes[along], usual[along] = max_source, min(_USUAL_SOURCE, max_source)
        most = [sizes.get(axis, size) for axis, size in enumerate(shape)]
        found[name] = Range(tuple(least), tuple(usual), tuple(most))
    return found


def add_engines(directory: Path, manifest: Manifest, options: EngineOptions, progress: Progress) -> Manifest:
    """Build an engine from each of a bundle's graphs, its encoder's too, in the bundle's directory.

    Args:
        directory: of the bundle.
        manifest: the bundle's; engines that it lists are replaced.
        options: what to build for.
        progress: told what is built, and how much of it.

    Returns:
        The manifest with the engines and without the checksums of new files.

    Raises:
        EngineError: the library refuses a graph, or its network is not what the graph says.
    """
    checked = check_engine_options(dataclasses.replace(options, build=True), manifest.quantization)
    assert checked is not None
    library, capabilities = checked
    max_source = 1 if manifest.encoder is None else manifest.encoder.max_source
    files = {name: info for name, info in manifest.files.items() if name not in manifest.engine_files}
    for old in manifest.engine_files:
        (directory / old).unlink(missing_ok=True)

    def built(role: str, name: str, graph: Path, time: int, dtype: str) -> EngineInfo:
        target = directory / f"{name}.engine"
        profile = build_engine(
            library, graph, target, facts=Facts.of(manifest, role), time=time, options=options, max_source=max_source,
            capabilities=capabilities, tell=lambda share: progress(f"building the {name} engine", share),
        )  # fmt: skip
        files[target.name] = FileInfo(target.stat().st_size, sha256_of(target))
        return EngineInfo(
            role, target.name, library.name, library.version, capabilities, dtype, profile, sha256_of(graph)
        )  # fmt: skip

    times = {role: (graph.file, graph.time) for role, graph in manifest.graphs.items()}
    if manifest.encoder is not None:
        times[ENCODE] = manifest.encoder.file, 1
    engines = [
        built(role, role, directory / file, time, manifest.dtype) for role, (file, time) in times.items()
    ]  # fmt: skip
    choosers = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for count in chosen_counts(manifest):
            graph = Path(scratch) / f"{CHOOSE}-{count}.onnx"
            graph.write_bytes(choosing_graph("float32", manifest.width, count, sized=True))
            choosers.append(ChooserInfo(count, built(CHOOSE, graph.stem, graph, 1, "float32")))
    return dataclasses.replace(
        manifest, engines=tuple(engines), choosers=tuple(choosers), files=dict(sorted(files.items()))
    )  # fmt: skip


def chosen_counts(manifest: Manifest) -> tuple[int, ...]:
    """How many tokens of a row there are engines to choose: the best, and as many as the usual top-k needs."""
    if manifest.vocab_size not in (0, manifest.width):
        return ()  # logits are over labels, of which nothing is drawn
    return tuple(sorted({1, min(_CANDIDATES, manifest.width)}))


def build_engine(
    library: BuilderLibrary, graph: Path, destination: Path, *, facts: Facts, time: int, options: EngineOptions,
    capabilities: Sequence[str], max_source: int = 1, tell: Any = lambda share: None,
) -> dict[str, Range]:  # fmt: skip
    """Build one engine and write it.

    Args:
        library: what builds.
        graph: the ONNX file, with its weights beside it.
        destination: the engine's file.
        facts: what its network must be.
        time: tokens of a step.
        options: sizes and memory.
        capabilities: to build for.
        max_source: the most tokens of a source, where there are any.
        tell: told the share that is done.

    Returns:
        The shapes that it takes, by input.

    Raises:
        EngineError: the text holds the library's own message.
    """
    trt = library.module
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # it must outlive the parser
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors) or "; ".join(logger.said)
        raise EngineError(f"{graph.name}: {library.name} {library.version} cannot parse it: {_short(said)}")
    shapes = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    check_parsed(trt, network, facts, graph.name)
    profile = profile_of(shapes, options.max_batch, time, sources=facts.sources, max_source=max_source)
    config = _config(trt, builder, profile, options, capabilities, library)
    config.progress_monitor = _monitor(trt, tell)
    timing = TimingCache(library.name, library.version, capabilities, config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{graph.name}: {library.name} {library.version} cannot build an engine of it: "
                          f"{_short('; '.join(logger.said)) or 'it gives no reason'}")  # fmt: skip
    timing.keep()
    destination.write_bytes(memoryview(engine))
    return profile


def _config(
    trt: Any, builder: Any, profile: Mapping[str, Range], options: EngineOptions, capabilities: Sequence[str],
    library: BuilderLibrary,
) -> Any:  # fmt: skip
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for name, sizes in profile.items():
        shapes.set_shape(name, sizes.min, sizes.opt, sizes.max)
    config.add_optimization_profile(shapes)
    if options.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if library.capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)
    return config


def _logger(trt: Any) -> Any:
    class Kept(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong instead of printing it."""

        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR") and "cudaError 35" not in message:  # that: no GPU here
                self.said.append(message)

    return Kept()


def _monitor(trt: Any, tell: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the progress of the outermost phase on."""

        def __init__(self) -> None:
            super().__init__()
            self.outer, self.steps = "", 1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outer, self.steps = phase_name, max(num_steps, 1)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outer:
                tell(min(1.0, (step + 1) / self.steps))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outer:
                tell(1.0)

    return Monitor()


def _short(text: str) -> str:
    return " ".join(text.split())[:500]
