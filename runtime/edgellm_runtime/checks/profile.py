"""Where the time of a prompt and of a token goes: each kernel's part, its layer, and the least that it could take.

Two sessions of the bundle take their rounds in turn, one with ONNX Runtime's profiler and one without, so that what the
profiler costs is known. Times of kernels are means over all rounds: their sum is that of the very steps whose time is
told beside them. Between rounds this machine's memory and arithmetic are measured, see
:mod:`edgellm_runtime.checks.roofline`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.bench import Workload, random_prompts
from edgellm_runtime.checks.kernel_events import Kernel, Run, node_of, read_runs
from edgellm_runtime.checks.kernel_times import Spent, mean_of
from edgellm_runtime.checks.layers import LAYER
from edgellm_runtime.checks.roofline import Roof, measure_roof
from edgellm_runtime.checks.traffic import GraphTraffic, Step, Traffic
from edgellm_runtime.errors import BackendError
from edgellm_runtime.graphs.layer_map import EMBEDDING, HEAD, SHARED, graph_nodes, layer_map
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.session import Session
from edgellm_runtime.threads import thread_count

__all__ = ["NOT_KNOWN", "PHASES", "Phase", "Profile", "TimedRun", "check_target", "profile"]

PHASES = ("prefill", "decode")
NOT_KNOWN = "not known"
_ON_CPU = ("cpu", "onnx")  # targets
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Phase:
    """One phase of all rounds.

    Args:
        name: ``prefill`` or ``decode``.
        tokens: that a step reads.
        plain_ms: of each round, a step's time without the profiler.
        profiled_ms: and with it.
        run_ms: of that, the time within ONNX Runtime, mean.
        kernels: each kernel's part of a step.
    """

    name: str
    tokens: int
    plain_ms: tuple[float, ...]
    profiled_ms: tuple[float, ...]
    run_ms: float
    kernels: tuple[Spent, ...]

    @property
    def kernels_ms(self) -> float:
        """All kernels together."""
        return sum(kernel.ms for kernel in self.kernels)

    @property
    def step_ms(self) -> float:
        """A step with the profiler, mean: what the times of kernels are part of."""
        return statistics.fmean(self.profiled_ms)

    @property
    def overhead(self) -> float:
        """By what part the profiler makes a step longer, in the round in the middle."""
        return statistics.median(p / q for p, q in zip(self.profiled_ms, self.plain_ms, strict=True)) - 1


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
        layer_of: the layer of each kernel, by its name.
    """

    workload: Workload
    device: str
    threads: int
    roof: Roof
    layers: Mapping[str, int]
    phases: tuple[Phase, ...]
    timeline: tuple[TimedRun, ...]
    layer_of: Mapping[str, str]


def profile(
    path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 16, depth: int = 0, rounds: int = 3,
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
        walls: dict[bool, list[_Walls]] = {True: [], False: []}
        steps: list[list[tuple[str, Step]]] = []
        roofs = []
        for number in range(rounds + 1):
            tell("measuring", number / (rounds + 1))
            for session in (noted, plain) if number % 2 else (plain, noted):
                taken, done = _round(session, workload, seed + number)
                walls[session is noted].append(taken)
                if session is noted:
                    steps.append(done)
            if number:
                roofs.append(measure_roof(threads))
        runs = read_runs(end())
    tell("reading the profile", 1.0)
    first = len(steps[0])
    if len(runs) != sum(map(len, steps)):
        raise BackendError(f"ONNX Runtime tells of {len(runs)} runs, and there were {sum(map(len, steps))}; try again")
    measured = [(*what, run) for what, run in zip([w for each in steps[1:] for w in each], runs[first:], strict=True)]
    graph = _GraphView(bundle, [run for _, _, run in measured])
    roof = replace(max(roofs, key=lambda r: r.bytes_per_s), operations_per_s=max(r.operations_per_s for r in roofs))
    found = tuple(
        _phase(name, workload, [w[name] for w in walls[False][1:]], [w[name] for w in walls[True][1:]],
               [(step, run) for phase, step, run in measured if phase == name], graph, roof)
        for name in PHASES
    )  # fmt: skip
    last = [TimedRun(*each) for each in measured[-len(steps[-1]) :] if each[0] in PHASES]
    return Profile(
        workload, noted.device, threads, roof, graph.sizes(), found, tuple(last), graph.layer_of
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


_Walls = dict[str, list[float]]  # by phase, the seconds of each step


def _round(session: Session, workload: Workload, seed: int) -> tuple[_Walls, list[tuple[str, Step]]]:
    """Depth, prompt and new tokens once: seconds of the steps, and each run of the graph with its phase."""
    walls: _Walls = {name: [] for name in ("depth", *PHASES)}
    runs: list[tuple[str, Step]] = []
    state = session.new_state(1, workload.tokens)
    held = 0

    def read(phase: str, tokens: Any) -> Any:
        before = held

        def piece(done: int, _all: int) -> None:
            nonlocal held
            runs.append((phase, Step(held, before + done - held, state.capacity)))
            held = before + done

        start = time.perf_counter()
        logits = session.step(tokens, state, progress=piece)
        walls[phase].append(time.perf_counter() - start)
        return logits[:, 0].argmax(-1)[:, None] % session.vocab_size

    prompt = random_prompts(session.vocab_size, workload.depth + workload.prompt_tokens, seed)()
    if workload.depth:
        read("depth", prompt[:, : workload.depth])
    token = read("prefill", prompt[:, workload.depth :])
    for _ in range(workload.new_tokens):
        token = read("decode", np.asarray(token, np.int64))
    return walls, runs


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
        kernels = {kernel.name: kernel for run in runs for kernel in run.kernels}
        self._place = {name: node_of(kernel, self._nodes, names) for name, kernel in kernels.items()}
        ran = {place for place in self._place.values() if place is not None}
        self._traffic = GraphTraffic(model, self._nodes, bundle.manifest.signature.state, ran)
        self.layer_of = {n: NOT_KNOWN if place is None else self._layers[place] for n, place in self._place.items()}

    def sizes(self) -> dict[str, int]:
        """The layers in the model's order, and how many nodes of the graph each has."""
        counts = Counter(self._layers)
        inner = [layer for layer in counts if layer not in (SHARED, EMBEDDING, HEAD)]
        order = [SHARED, EMBEDDING, *inner, HEAD]
        found = {layer: counts[layer] for layer in order if layer in counts}
        return found | ({NOT_KNOWN: 0} if NOT_KNOWN in self.layer_of.values() else {})

    def traffic(self, kernel: Kernel, step: Step) -> Traffic | None:
        return self._traffic.of(kernel, self._place[kernel.name], step)


def _phase(
    name: str, workload: Workload, plain: Sequence[Sequence[float]], profiled: Sequence[Sequence[float]],
    runs: Sequence[tuple[Step, Run]], graph: _GraphView, roof: Roof,
) -> Phase:  # fmt: skip
    steps = sum(map(len, profiled))
    each: dict[str, list[Spent]] = defaultdict(list)
    for step, run in runs:
        for kernel in run.kernels:
            each[kernel.name].append(_spent(kernel, graph.layer_of[kernel.name], graph.traffic(kernel, step), roof))
    kernels = [mean_of(found, steps) for found in each.values()]
    without, with_it = (tuple(1e3 * statistics.fmean(taken) for taken in rounds) for rounds in (plain, profiled))
    return Phase(
        name, workload.prompt_tokens if name == "prefill" else 1, without, with_it,
        sum(run.us for _, run in runs) / steps / 1e3,
        tuple(sorted(kernels, key=lambda kernel: kernel.ms, reverse=True)),
    )  # fmt: skip


def _spent(kernel: Kernel, layer: str, traffic: Traffic | None, roof: Roof) -> Spent:
    ms, least = kernel.us / 1e3, None if traffic is None else roof.seconds(traffic)
    return Spent(
        kernel.name, kernel.op, layer, 1, ms, traffic or Traffic(operations=None), ms if traffic is None else 0.0,
        None if least is None else 1e3 * least,
    )  # fmt: skip
