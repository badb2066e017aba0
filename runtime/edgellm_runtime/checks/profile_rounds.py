"""Rounds of a profile: the same steps with the profiler and without it, in turn, and which of them count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgellm_runtime.checks.bench import Workload, random_prompts
from edgellm_runtime.checks.kernel_events import Run
from edgellm_runtime.checks.roofline import Roof, measure_roof
from edgellm_runtime.checks.traffic import Step
from edgellm_runtime.errors import BackendError
from edgellm_runtime.session import Session

__all__ = ["DEPTH", "PHASES", "Read", "Rounds", "take_turns"]

PHASES = ("prefill", "decode")
DEPTH = "depth"  # what is read before the prompt, and is not measured
Tell = Callable[[str, float], None]


@dataclass
class Read:
    """One step of a session, which may run a graph several times.

    Args:
        phase: that it is part of.
        seconds: that it took.
        steps: what each run of the graph did.
        runs: what the profiler says of each; empty without it.
    """

    phase: str
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Rounds:
    """What was measured, one list a round.

    Args:
        plain: steps without the profiler.
        profiled: and with it.
        warm: runs of the round that does not count, with the profiler.
        roof: of the machine, the best of all rounds; None where it was not measured.
    """

    plain: Sequence[Sequence[Read]]
    profiled: Sequence[Sequence[Read]]
    warm: int
    roof: Roof | None

    def give_runs(self, runs: Sequence[Run]) -> None:
        """Hand the profiler's runs, the unmeasured ones among them, to the steps that they were for.

        Raises:
            BackendError: there are more or fewer.
        """
        reads = [read for each in self.profiled for read in each]
        expected = self.warm + sum(len(read.steps) for read in reads)
        if len(runs) != expected:
            raise BackendError(f"the profiler tells of {len(runs)} runs, and there were {expected}; profile again")
        left = iter(runs[self.warm :])
        for read in reads:
            read.runs = [next(left) for _ in read.steps]

    @staticmethod
    def kept(rounds: Sequence[Sequence[Read]], phase: str) -> list[Read]:
        """Of each step of a phase, the faster half of its rounds: what slows a machine for a while drops out."""
        steps = zip(*([read for read in each if read.phase == phase] for each in rounds), strict=True)
        half = math.ceil(len(rounds) / 2)
        return [read for same in steps for read in sorted(same, key=lambda read: read.seconds)[:half]]


def take_turns(
    plain: Session, noted: Session, workload: Workload, rounds: int, *, threads: int | None, seed: int, tell: Tell
) -> Rounds:
    """Do a workload with two sessions in turn, after a round that does not count; measure the machine between.

    Args:
        plain: as it is.
        noted: with the profiler.
        workload: what each round does, with one row.
        rounds: that count.
        threads: that the sessions have, and with which the machine is measured; None not to measure it.
        seed: of the random prompts, which both sessions read.
        tell: hears what is done, and the share that is done.
    """
    taken: dict[bool, list[list[Read]]] = {True: [], False: []}
    roofs = []
    for number in range(rounds + 1):
        tell("measuring", number / (rounds + 1))
        for session in (noted, plain) if number % 2 else (plain, noted):
            taken[session is noted].append(_round(session, workload, seed + number))
        if number and threads is not None:
            roofs.append(measure_roof(threads))
    warm, *profiled = taken[True]
    return Rounds(taken[False][1:], profiled, sum(len(read.steps) for read in warm), _best(roofs))


def _best(roofs: Sequence[Roof]) -> Roof | None:
    if not roofs:
        return None
    most = max(roof.operations_per_s for roof in roofs)
    return replace(max(roofs, key=lambda roof: roof.bytes_per_s), operations_per_s=most)


def _round(session: Session, workload: Workload, seed: int) -> list[Read]:
    """Depth, prompt and new tokens once."""
    found: list[Read] = []
    state = session.new_state(1, workload.tokens)
    held = 0

    def step(phase: str, tokens: Any) -> Any:
        read, before = Read(phase), held

        def piece(done: int, _all: int) -> None:
            nonlocal held
            read.steps.append(Step(held, before + done - held, state.capacity))
            held = before + done

        start = time.perf_counter()
        logits = session.step(tokens, state, progress=piece)
        read.seconds = time.perf_counter() - start
        found.append(read)
        return logits[:, 0].argmax(-1)[:, None] % session.vocab_size

    prompt = random_prompts(session.vocab_size, workload.depth + workload.prompt_tokens, seed)()
    if workload.depth:
        step(DEPTH, prompt[:, : workload.depth])
    token = step(PHASES[0], prompt[:, workload.depth :])
    for _ in range(workload.new_tokens):
        token = step(PHASES[1], np.asarray(token, np.int64))
    return found
