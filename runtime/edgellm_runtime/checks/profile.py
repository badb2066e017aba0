"""Where the time of a prompt and of a token goes: each kernel's part, its layer, and the least that it could take.

Two sessions of the bundle take their rounds in turn, one with the library's profiler and one without, so that what the
profiler costs is known. Times of kernels are means over the very steps whose time is told beside them. Between rounds
this machine's memory and arithmetic are measured, see :mod:`edgellm_runtime.checks.roofline`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.bench import Workload
from edgellm_runtime.checks.kernel_events import Kernel, Run
from edgellm_runtime.checks.kernel_times import Spent, mean_of
from edgellm_runtime.checks.profile_rounds import PHASES, Read, Rounds, Tell, take_turns
from edgellm_runtime.checks.profile_sources import Source, View, check_bundle, open_source
from edgellm_runtime.checks.roofline import Roof
from edgellm_runtime.checks.traffic import Step, Traffic
from edgellm_runtime.loading import open_session
from edgellm_runtime.threads import thread_count

__all__ = ["Phase", "Profile", "TimedRun", "profile"]


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
        run_ms: of that, the time within the library that runs graphs; None where it does not tell.
        kernels: each kernel's part of a step.
    """

    name: str
    tokens: int
    plain_rounds_ms: tuple[float, ...]
    profiled_rounds_ms: tuple[float, ...]
    plain_ms: float
    step_ms: float
    run_ms: float | None
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
        roof: what the machine can do; None on a GPU, which is not measured.
        layers: of the model in their order, with the number of the graph's nodes in each.
        phases: prefill and decode.
        timeline: the last round.
        layer_of: the layer of each kernel, by its key.
    """

    workload: Workload
    device: str
    threads: int
    roof: Roof | None
    layers: Mapping[str, int]
    phases: tuple[Phase, ...]
    timeline: tuple[TimedRun, ...]
    layer_of: Mapping[tuple[str, int | None], str]


def profile(
    path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 16, depth: int = 0, rounds: int = 5,
    threads: int | None = None, device: str = "auto", kernels: str | None = None, seed: int = 0,
    tell: Tell = lambda _what, _share: None,
) -> Profile:  # fmt: skip
    """Profile a bundle with random prompts, after a round that is not measured.

    Args:
        path: a bundle of a model that goes on with texts.
        prompt_tokens: length of the prompt.
        new_tokens: steps after it, of one token each.
        depth: tokens read before the prompt, which are not measured.
        rounds: measured with and without the profiler in turn.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        device: as :func:`edgellm_runtime.load` takes it.
        kernels: likewise.
        seed: of the random prompts.
        tell: hears what is done, and the share that is done.

    Raises:
        OptionError: a count below 1, or a depth below 0.
        BackendError: the times of its kernels on that device cannot be known; the text says why.
        ContextError: depth, prompt and new tokens do not fit into the context.
    """
    workload = Workload(prompt_tokens, new_tokens, depth)
    check_integer("rounds", rounds, 1)
    check_bundle(path, device)
    threads = thread_count(threads)
    tell("checking files", 0.0)
    bundle = Bundle(path)
    workload.check(bundle.manifest.max_context)
    with tempfile.TemporaryDirectory() as scratch:
        plain = open_session(bundle, device=device, threads=threads, kernels=kernels)
        source = open_source(bundle, Path(scratch), device=device, threads=threads, kernels=kernels)
        measured = threads if plain.device == "cpu" else None
        turns = take_turns(plain, source.session, workload, rounds, threads=measured, seed=seed, tell=tell)
        tell("reading the profile", 1.0)
        turns.give_runs(source.runs())
    graph = source.view([run for each in turns.profiled for read in each for run in read.runs])
    timeline = [
        TimedRun(read.phase, step, run)
        for read in turns.profiled[-1] if read.phase in PHASES
        for step, run in zip(read.steps, read.runs, strict=True)
    ]  # fmt: skip
    return Profile(
        workload, plain.device, threads, turns.roof, graph.sizes(),
        tuple(_phase(name, turns, source, graph) for name in PHASES), tuple(timeline), graph.layer_of,
    )  # fmt: skip


def _phase(name: str, rounds: Rounds, source: Source, graph: View) -> Phase:
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
        sum(run.us for read in kept for run in read.runs) / len(kept) / 1e3 if source.tells_runs else None,
        tuple(sorted(kernels, key=lambda kernel: kernel.ms, reverse=True)),
    )  # fmt: skip


def _mean_ms(reads: Sequence[Read]) -> float:
    return 1e3 * statistics.fmean(read.seconds for read in reads)


def _each_round(rounds: Sequence[Sequence[Read]], phase: str) -> tuple[float, ...]:
    return tuple(_mean_ms([read for read in each if read.phase == phase]) for each in rounds)


def _spent(kernel: Kernel, layer: str, traffic: Traffic | None, roof: Roof | None) -> Spent:
    ms, least = kernel.us / 1e3, None if traffic is None or roof is None else roof.seconds(traffic)
    return Spent(
        kernel.name, kernel.op, layer, 1, ms, traffic or Traffic(operations=None), ms if traffic is None else 0.0,
        None if least is None else 1e3 * least,
    )  # fmt: skip
