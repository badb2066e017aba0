"""Where the time of a prompt and of a token goes: each kernel's part, its layer, and the least that it could take.

Two sessions of the bundle take their rounds in turn, one with ONNX Runtime's profiler and one without, so that what the
profiler costs is known. Times of kernels are means over the very steps whose time is told beside them. Between rounds
this machine's memory and arithmetic are measured, see :mod:`edgellm_runtime.checks.roofline`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.bench import Workload
from edgellm_runtime.checks.kernel_events import Kernel, Run, node_of, read_runs
from edgellm_runtime.checks.kernel_times import Spent, mean_of
from edgellm_runtime.checks.layers import LAYER
from edgellm_runtime.checks.profile_rounds import PHASES, Read, Rounds, Tell, take_turns
from edgellm_runtime.checks.roofline import Roof
from edgellm_runtime.checks.traffic import GraphTraffic, Step, Traffic
from edgellm_runtime.errors import BackendError
from edgellm_runtime.graphs.layer_map import EMBEDDING, HEAD, SHARED, graph_nodes, layer_map
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.threads import thread_count

__all__ = ["NOT_KNOWN", "Phase", "Profile", "TimedRun", "check_target", "profile"]

NOT_KNOWN = "not known"
_ON_CPU = ("cpu", "onnx")  # targets


@dataclass(frozen=True)
class Phase:
    """One phase of all rounds, of whose steps the faster half counts.

    Args:
        name: ``prefill`` or ``decode``.
        tokens: that a step reads.
        plain_rounds_ms: of each round, a step's time without the profiler.
        profiled_rounds_ms: and with it.
        plain_ms: of a step that counts, without the profiler, mean.
        step_ms: and with it: what the times of kernels are part of.
        run_ms: of that, the time within ONNX Runtime.
        kernels: each kernel's part of a step.
    """

    name: str
    tokens: int
    plain_rounds_ms: tuple[float, ...]
    profiled_rounds_ms: tuple[float, ...]
    plain_ms: float
    step_ms: float
    run_ms: float
    kernels: tuple[Spent, ...]

    @property
    def kernels_ms(self) -> float:
        """All kernels together."""
        return sum(kernel.ms for kernel in self.kernels)

    @property
    def overhead(self) -> float:
        """By what part the profiler makes a step longer."""
        return self.step_ms / self.plain_ms - 1


@dataclass(frozen=True)
class TimedRun:
    """One run of the graph in the last round, for a timeline.

    Args:
        phase: that it is part of.
        step: what it did.
        run: its kernels.
    """

    phase: str
    step: Step
    run: Run


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` found.

    Args:
        workload: what each round did.
        device: where.
        threads: of the CPU.
        roof: what the machine can do.
        layers: of the model in their order, with the number of the graph's nodes in each.
        phases: prefill and decode.
        timeline: the last round.
        layer_of: the layer of each kernel, by its key.
    """

    workload: Workload
    device: str
    threads: int
    roof: Roof
    layers: Mapping[str, int]
    phases: tuple[Phase, ...]
    timeline: tuple[TimedRun, ...]
    layer_of: Mapping[tuple[str, int | None], str]


def profile(
    path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 16, depth: int = 0, rounds: int = 5,
    threads: int | None = None, device: str = "auto", seed: int = 0, tell: Tell = lambda _what, _share: None,
) -> Profile:  # fmt: skip
    """Profile a bundle with random prompts, after a round that is not measured.

    Args:
        path: a bundle for target cpu or onnx.
        prompt_tokens: length of the prompt.
        new_tokens: steps after it, of one token each.
        depth: tokens read before the prompt, which are not measured.
        rounds: measured with and without the profiler in turn.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        device: as :func:`edgellm_runtime.load` takes it.
        seed: of the random prompts.
        tell: hears what is done, and the share that is done.

    Raises:
        OptionError: a count below 1, or a depth below 0.
        BackendError: the bundle is for another target.
        ContextError: depth, prompt and new tokens do not fit into the context.
    """
    workload = Workload(prompt_tokens, new_tokens, depth)
    check_integer("rounds", rounds, 1)
    check_target(path)
    threads = thread_count(threads)
    tell("checking files", 0.0)
    bundle = Bundle(path)
    workload.check(bundle.manifest.max_context)
    from edgellm_runtime.loading import open_profiled, open_session

    with tempfile.TemporaryDirectory() as scratch:
        plain = open_session(bundle, device=device, threads=threads)
        noted, end = open_profiled(bundle, Path(scratch) / "run", device=device, threads=threads)
        turns = take_turns(plain, noted, workload, rounds, threads=threads, seed=seed, tell=tell)
        tell("reading the profile", 1.0)
        turns.give_runs(read_runs(end()))
    graph = _GraphView(bundle, [run for each in turns.profiled for read in each for run in read.runs])
    timeline = [
        TimedRun(read.phase, step, run)
        for read in turns.profiled[-1] if read.phase in PHASES
        for step, run in zip(read.steps, read.runs, strict=True)
    ]  # fmt: skip
    return Profile(
        workload, noted.device, threads, turns.roof, graph.sizes(),
        tuple(_phase(name, turns, graph) for name in PHASES), tuple(timeline), graph.layer_of,
    )  # fmt: skip


def check_target(path: str | Path) -> None:
    """Make sure that a bundle can be profiled, before any work.

    Raises:
        BackendError: it is for a target that does not run on ONNX Runtime's CPU kernels.
    """
    manifest = Bundle(path, checksums=False).manifest
    target = manifest.target["name"]
    if manifest.encoder is not None:
        raise BackendError(f"{path}: answers sources, and profiles are of models that go on with texts; use bench")
    if target not in _ON_CPU:
        raise BackendError(
            f"{path}: was exported for target {target}, and only ONNX Runtime on CPU tells what each kernel takes; "
            "profile a bundle for target cpu, or use NVIDIA's Nsight Systems on this one"
        )


class _GraphView:
    """What the graph tells of the kernels that ran.

    Args:
        bundle: its bundle.
        runs: those that are measured.
    """

    def __init__(self, bundle: Bundle, runs: Sequence[Run]) -> None:
        model = read_model(bundle.read(GRAPH))
        self._nodes = graph_nodes(model)
        self._layers = layer_map(model, bundle.manifest.layers, LAYER)
        names = Counter(node.name for node in self._nodes)
        kernels = {kernel.key: kernel for run in runs for kernel in run.kernels}
        self._place = {key: node_of(kernel, self._nodes, names) for key, kernel in kernels.items()}
        ran = {place for place in self._place.values() if place is not None}
        self._traffic = GraphTraffic(model, self._nodes, bundle.manifest.signature.state, ran)
        self.layer_of = {k: NOT_KNOWN if place is None else self._layers[place] for k, place in self._place.items()}

    def sizes(self) -> dict[str, int]:
        """The layers in the model's order, and how many nodes of the graph each has."""
        counts = Counter(self._layers)
        inner = [layer for layer in counts if layer not in (SHARED, EMBEDDING, HEAD)]
        order = [SHARED, EMBEDDING, *inner, HEAD]
        found = {layer: counts[layer] for layer in order if layer in counts}
        return found | ({NOT_KNOWN: 0} if NOT_KNOWN in self.layer_of.values() else {})

    def traffic(self, kernel: Kernel, step: Step) -> Traffic | None:
        return self._traffic.of(kernel, self._place[kernel.key], step)


def _phase(name: str, rounds: Rounds, graph: _GraphView) -> Phase:
    kept = Rounds.kept(rounds.profiled, name)
    each: dict[tuple[str, int | None], list[Spent]] = defaultdict(list)
    for read in kept:
        for step, run in zip(read.steps, read.runs, strict=True):
            for kernel in run.kernels:
                layer, traffic = graph.layer_of[kernel.key], graph.traffic(kernel, step)
                each[kernel.key].append(_spent(kernel, layer, traffic, rounds.roof))
    kernels = [mean_of(found, len(kept)) for found in each.values()]
    return Phase(
        name, sum(step.time for step in kept[0].steps), _each_round(rounds.plain, name),
        _each_round(rounds.profiled, name), _mean_ms(Rounds.kept(rounds.plain, name)), _mean_ms(kept),
        sum(run.us for read in kept for run in read.runs) / len(kept) / 1e3,
        tuple(sorted(kernels, key=lambda kernel: kernel.ms, reverse=True)),
    )  # fmt: skip


def _mean_ms(reads: Sequence[Read]) -> float:
    return 1e3 * statistics.fmean(read.seconds for read in reads)


def _each_round(rounds: Sequence[Sequence[Read]], phase: str) -> tuple[float, ...]:
    return tuple(_mean_ms([read for read in each if read.phase == phase]) for each in rounds)


def _spent(kernel: Kernel, layer: str, traffic: Traffic | None, roof: Roof) -> Spent:
    ms, least = kernel.us / 1e3, None if traffic is None else roof.seconds(traffic)
    return Spent(
        kernel.name, kernel.op, layer, 1, ms, traffic or Traffic(operations=None), ms if traffic is None else 0.0,
        None if least is None else 1e3 * least,
    )  # fmt: skip
