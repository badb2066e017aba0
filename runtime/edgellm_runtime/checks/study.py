"""Several bundles and workloads measured in turn, round by round, until the figures are sure enough; and compared."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgellm_runtime.arguments import check_integer, check_number
from edgellm_runtime.checks import machine
from edgellm_runtime.checks.bench import Round, Workload, summary, versions
from edgellm_runtime.checks.bench_worker import Worker
from edgellm_runtime.checks.comparison import Comparison, compare, interval
from edgellm_runtime.errors import OptionError
from edgellm_runtime.kernel_choice import chosen_kernels
from edgellm_runtime.threads import available_cores, thread_count

__all__ = ["FIGURES", "FORMAT", "Cell", "Plan", "comparisons", "machine_now", "matched", "measure"]

FORMAT = "edgellm bench 1"
FIGURES: dict[str, Callable[[Round], float]] = {"prefill": lambda r: r.ttft_s, "decode": lambda r: r.decode_s}
_NOISY = 0.1  # of a median: such a spread of rounds says more of the machine than of the model


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        bundles: paths; all are loaded at once, and take their rounds in turn.
        workloads: what each round does.
        threads: numbers of CPU threads, each of which loads the bundles anew; None is the usual one.
        rounds: measured rounds at least, after one that is not.
        precision: go on until half of each figure's 95% interval is at most this part of it; 0 does not.
        most_rounds: at most so many, however wide the intervals are.
        device: for loading.
        seed: of the prompts.
        kernels: those that each bundle is loaded with, beside each other; None is the usual ones.
        openers: of those of ``bundles`` that are none, modules that open them, as :class:`Worker` takes them.
        adapter: the name of one that each bundle has, for all of its rows; None for none.

    Raises:
        OptionError: a value is out of its range, or there is nothing to measure.
    """

    bundles: Sequence[str | Path]
    workloads: Sequence[Workload]
    threads: Sequence[int | None] = (None,)
    rounds: int = 5
    precision: float = 0.0
    most_rounds: int = 50
    device: str = "auto"
    seed: int = 0
    kernels: Sequence[str | None] = (None,)
    openers: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_integer("rounds", self.rounds, 1)
        check_number("precision", self.precision, 0, 1)
        check_integer("most_rounds", self.most_rounds, 1)
        if not self.bundles or not self.workloads or not self.threads:
            raise OptionError("there is nothing to measure; name a bundle, a workload and a number of threads")


@dataclass
class Cell:
    """One bundle under one workload.

    Args:
        bundle: its path.
        workload: what each round did.
        threads: of the CPU.
        device: where it ran.
        load_s: seconds of loading.
        rounds: in the order in which they were taken.
        peak_rss_mb: of its process, with this workload and those before it.
        joules: of the whole machine's processors during its rounds; None where the system does not say.
        kernels: whose ran its products, ``onnxruntime``, ``own``, or ``PyTorch``.
        adapter: of its rows, or none.
    """

    bundle: str
    workload: Workload
    threads: int
    device: str
    load_s: float
    rounds: list[Round] = field(default_factory=list)
    peak_rss_mb: float | None = None
    joules: float | None = None
    kernels: str = "onnxruntime"
    adapter: str | None = None

    @property
    def name(self) -> str:
        """The bundle's path, and what is other than usual about how it ran."""
        unusual = [
            *([] if self.kernels == "onnxruntime" else [f"{self.kernels} kernels"]),
            *([] if self.adapter is None else [f"adapter {self.adapter}"]),
        ]
        return f"{self.bundle} ({', '.join(unusual)})" if unusual else self.bundle

    def times(self, figure: str) -> list[float]:
        """Seconds of each round, of ``prefill`` or ``decode``."""
        return [FIGURES[figure](r) for r in self.rounds]

    @property
    def noisy(self) -> bool:
        """Whether rounds differ by more than can be the model's doing."""
        return any(_spread(self.times(figure)) > _NOISY for figure in FIGURES)

    def to_json(self) -> dict[str, Any]:
        """Figures, their intervals, and every round."""
        w, tokens = self.workload, self.workload.batch * self.workload.new_tokens * len(self.rounds)
        counts = {"prefill": w.batch * w.prompt_tokens, "decode": w.batch * w.new_tokens}
        return {
            "bundle": self.bundle, "name": self.name, **asdict(w), "threads": self.threads, "device": self.device,
            "kernels": self.kernels, "adapter": self.adapter,
            "load_s": round(self.load_s, 3), **summary(self.rounds, w),
            "intervals": {
                f"{name}_tokens_per_s": [round(counts[name] / t, 1) for t in reversed(interval(self.times(name)))]
                for name in FIGURES
            },
            "peak_rss_mb": self.peak_rss_mb,
            "joules_per_token": None if self.joules is None else round(self.joules / tokens, 4),
            "noisy": self.noisy,
            "tokens_sha256": [r.tokens_sha256[:16] for r in self.rounds],
            "rounds": [{"ttft_s": r.ttft_s, "steps_s": list(r.steps_s)} for r in self.rounds],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cell:
        """What :meth:`to_json` wrote.

        Raises:
            OptionError: it is nothing of the kind.
        """
        try:
            workload = Workload(data["prompt_tokens"], data["new_tokens"], data["depth"], data["batch"])
            rounds = [
                Round(float(r["ttft_s"]), tuple(map(float, r["steps_s"])), str(digest))
                for r, digest in zip(data["rounds"], data["tokens_sha256"], strict=True)
            ]
            if not rounds or any(r.ttft_s <= 0 or r.decode_s <= 0 for r in rounds):
                raise ValueError("it has no rounds, or times below 0")
            adapter = data.get("adapter")
            return cls(
                str(data["bundle"]), workload, int(data["threads"]), str(data["device"]), 0.0, rounds,
                kernels=str(data.get("kernels", "onnxruntime")), adapter=None if adapter is None else str(adapter),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(f"this is no result of edgellm bench ({error}); write one with --output FILE") from error


def measure(plan: Plan, progress: Callable[[str, float], None] = lambda what, share: None) -> list[Cell]:
    """Measure every bundle under every workload.

    Args:
        plan: what.
        progress: told what is being done, and which part of it is.

    Raises:
        RuntimeFault: a bundle cannot be loaded, or a workload does not fit into its context.
    """
    return [cell for threads in plan.threads for cell in _with_threads(plan, thread_count(threads), progress)]


def _with_threads(plan: Plan, threads: int, progress: Callable[[str, float], None]) -> list[Cell]:
    done: list[Cell] = []
    with contextlib.ExitStack() as stack:
        ways = [
            (bundle, kernels)
            for bundle in plan.bundles
            for kernels in ([None] if str(bundle) in plan.openers else map(chosen_kernels, plan.kernels))
        ]
        adapters = [None if str(bundle) in plan.openers else plan.adapter for bundle, _ in ways]
        workers = []
        for (bundle, kernels), adapter in zip(ways, adapters, strict=True):
            progress(f"loading {bundle}", 0.0)
            worker = Worker(
                bundle, threads=threads, device=plan.device, kernels=kernels, adapter=adapter,
                opener=plan.openers.get(str(bundle), ""),
            )  # fmt: skip
            workers.append(stack.enter_context(worker))
        for workload, worker in itertools.product(plan.workloads, workers):
            workload.check(worker.loaded["max_context"])
        for workload in plan.workloads:
            cells = [
                Cell(
                    str(bundle),
                    workload,
                    threads,
                    worker.loaded["device"],
                    worker.loaded["load_s"],
                    kernels=worker.loaded["kernels"],
                    adapter=adapter,
                )
                for (bundle, _), adapter, worker in zip(ways, adapters, workers, strict=True)
            ]
            _rounds(plan, list(zip(cells, workers, strict=True)), progress)
            done += cells
    return done


def _rounds(plan: Plan, pairs: list[tuple[Cell, Worker]], progress: Callable[[str, float], None]) -> None:
    """Rounds in turn, the first in each turn last in the next, until the figures are sure enough."""
    workload, threads = pairs[0][0].workload, pairs[0][0].threads
    what = f"{workload}, {threads} threads"
    for _, worker in pairs:
        worker.round(workload, plan.seed)
    for number in range(plan.most_rounds):
        progress(what, min(1.0, number / plan.rounds))
        for cell, worker in pairs if number % 2 == 0 else reversed(pairs):
            before = machine.energy()
            cell.rounds.append(worker.round(workload, plan.seed + 1 + number))
            after = machine.energy()
            if before is not None and after is not None and after >= before:  # counters begin anew now and then
                cell.joules = (cell.joules or 0.0) + after - before
        if number + 1 >= plan.rounds and (not plan.precision or _sure(pairs, plan.precision)):
            break
    for cell, worker in pairs:
        cell.peak_rss_mb = worker.peak_rss_mb()


def _sure(pairs: list[tuple[Cell, Worker]], precision: float) -> bool:
    """Whether every figure, or with several bundles every ratio to the first, is known to ``precision``."""
    first = pairs[0][0]
    for figure in FIGURES:
        for cell, _ in pairs[1:]:
            found = compare(first.times(figure), cell.times(figure), paired=True)
            if found.high - found.low > 2 * precision * found.speed:
                return False
        if len(pairs) == 1:
            low, high = interval(first.times(figure))
            if high - low > 2 * precision * statistics.median(first.times(figure)):
                return False
    return True


def _spread(times: Sequence[float]) -> float:
    """Half of what the middle four fifths span, as a part of the median."""
    if len(times) < 3:
        return 0.0
    order = sorted(times)
    cut = len(order) // 10
    return (order[-1 - cut] - order[cut]) / 2 / statistics.median(order)


def comparisons(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each later bundle beside the first, under each workload, from rounds that were taken in turn."""
    found = []
    for _, group in itertools.groupby(cells, lambda c: (c.workload, c.threads)):
        first, *others = group
        found += [_compared(first, other, paired=True) for other in others]
    return found


def matched(before: Sequence[Cell], after: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells of two results that measure the same workload, compared; those of one bundle's path first.

    Raises:
        OptionError: they have no workload in common.
    """
    found = []
    for old in before:
        same = [c for c in after if (c.workload, c.threads) == (old.workload, old.threads)]
        named = [c for c in same if c.name == old.name]
        if chosen := (named or same)[:1]:
            found.append(_compared(old, chosen[0], paired=False))
    if not found:
        raise OptionError("the two results have no workload in common; measure both with the same options")
    return found


def _compared(first: Cell, second: Cell, *, paired: bool) -> dict[str, Any]:
    count = min(len(first.rounds), len(second.rounds))
    same = all(
        a.tokens_sha256 == b.tokens_sha256 for a, b in zip(first.rounds[:count], second.rounds[:count], strict=True)
    )
    figures = {}
    for figure in FIGURES:
        result: Comparison = compare(first.times(figure), second.times(figure), paired=paired)
        figures[figure] = {
            "speed": round(result.speed, 4), "low": round(result.low, 4), "high": round(min(result.high, 1e9), 4),
            "verdict": result.verdict,
        }  # fmt: skip
    return {
        "first": first.name, "second": second.name, **asdict(first.workload), "threads": first.threads,
        "paired": paired, "same_tokens": same, **figures,
    }  # fmt: skip


def machine_now() -> dict[str, Any]:
    """What the figures are of, and how busy the machine is: to be noted before and after."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "processor": machine.processor_name(), "cores": available_cores(), "affinity": affinity,
        "governor": machine.governor(), "load": machine.other_load(), "throttled": machine.throttled(),
        "versions": versions(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
