"""Aim, build, measure, and aim again: estimates decide what to build, measurements what to keep."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgellm_exporters.auto.budget import Budget
from edgellm_exporters.auto.report import Attempt
from edgellm_exporters.auto.search import QUALITY, Choice, Table, search
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.graph.write import Progress
from edgellm_exporters.proof.parity import ParityReport
from edgellm_exporters.quantize.plan import Plan, Scheme

__all__ = ["Job", "MeasuredSearch"]

_AIMS = (0.8, 0.9, 0.8)  # share of the budget that each build is to use, by the prediction as far as it is corrected
_HALF = 0.5  # of the budget: a bundle that uses less is worth another try
_DOUBT = 2.0  # an estimate above the budget by less than this factor is measured before it is believed
_WEIGHINGS = 3  # of the graph: other formats have other nodes
_LATER = 420_000  # bytes of the files that come after the weights: goldens, manifest, report, picture


@dataclass(frozen=True)
class Built:
    """A written graph: its bytes, and the plan that it was written with."""

    nbytes: int
    plan: Plan


class Job(Protocol):
    """Builds a graph with any formats, and measures it."""

    def build(
        self, schemes: Mapping[str, Scheme], largest: Mapping[str, Any], directory: Path, progress: Progress
    ) -> Built:
        """Write the graph."""
        ...

    def weigh(self, schemes: Mapping[str, Scheme], directory: Path) -> int:
        """Bytes of the graph's files with those formats, whatever their codes; nothing is left in the directory."""
        ...

    def measure(self, directory: Path, progress: Progress) -> ParityReport:
        """Compare it with the float model."""
        ...


class MeasuredSearch:
    """Up to three builds, each aimed with what the ones before it measured.

    Args:
        budget: to keep to.
        job: builds and measures.
        table: the weights' formats, with what the budget prefers as their cost.
        largest: what the job's builds are smoothed by.
        directory: of the new bundle.
        floats: bytes of the weights that stay as they are.
        others: bytes of the bundle's files that are there already.
    """

    def __init__(
        self, budget: Budget, job: Job, table: Table, largest: Mapping[str, Any], directory: Path, floats: int,
        others: int,
    ) -> None:  # fmt: skip
        self.budget, self.job, self.table, self.largest, self.directory = budget, job, table, largest, directory
        self.rest, self.ratio, self._others = floats + others, 1.0, others
        self.attempts: list[Attempt] = []
        self.plan = Plan()  # of the best that holds

    def run(self, progress: Progress) -> Attempt:
        """Build and measure; the best that holds is left in the directory.

        Raises:
            QuantizeError: none holds.
        """
        self._weigh(progress)
        best: Attempt | None = None
        for number, aim in enumerate(_AIMS):
            choice = self._choose(aim)
            if choice is None or any(choice.schemes == a.choice.schemes for a in self.attempts):
                break
            attempt, built = self._try(number, choice, progress)
            if attempt.holds and (best is None or attempt.choice.cost < best.choice.cost):
                best, self.plan = attempt, built.plan
            del built  # codes that calibration chose are as many as the weights
            if attempt.holds and (self._best_quality or attempt.report.kl >= _HALF * self.budget.max_kl):
                break
        if best is None:
            raise QuantizeError(self._what_can_be_met())
        return self._keep(best)

    def _weigh(self, progress: Progress) -> None:
        """Learn what files take besides weights: a build that is too large by a little was for nothing."""
        for number in range(_WEIGHINGS if self.budget.max_size_mb is not None else 0):
            choice = self._choose(_AIMS[0])
            if choice is None:
                return
            progress("weighing the graph", number / _WEIGHINGS)
            before, self.rest = self.rest, self._weighed(choice)
            if number and self.rest <= before:  # what was chosen with more taken for granted keeps to the size
                self.rest = before
                return

    def _weighed(self, choice: Choice) -> int:
        """Bytes of the bundle besides the weights whose formats are chosen, with that choice's graph."""
        return int(self.job.weigh(choice.schemes, self.directory) - choice.nbytes) + self._others

    def _choose(self, aim: float) -> Choice | None:
        """The cheapest that is expected to hold; if none is, the nearest, if that is near enough to be tried."""
        limit = self.budget.max_bytes - _LATER - self.rest
        if self._best_quality:
            return search(self.finest, math.inf, limit)
        found = search(self.table, aim * self.budget.max_kl / self.ratio, limit)
        if found is not None or any(a.holds for a in self.attempts):
            return found
        nearest = search(self.finest, math.inf, limit)
        if nearest is None or nearest.kl * self.ratio > _DOUBT * self.budget.max_kl:
            return None
        return dataclasses.replace(nearest, cost=self._cost(nearest))

    @property
    def _best_quality(self) -> bool:
        return self.budget.prefer == QUALITY

    @property
    def finest(self) -> Table:
        """The same choices, with nothing to minimise but the KL divergence."""
        return dataclasses.replace(self.table, cost=self.table.kl)

    def _cost(self, choice: Choice) -> float:
        rows = zip(self.table.names, self.table.schemes, self.table.cost, strict=True)
        return float(sum(costs[schemes.index(choice.schemes[name])] for name, schemes, costs in rows))

    def _try(self, number: int, choice: Choice, progress: Progress) -> tuple[Attempt, Built]:
        def tell(what: str, share: float) -> None:
            progress(f"build {number + 1}: {what}", share)

        directory = self.directory / f"attempt-{number}"
        directory.mkdir()
        built = self.job.build(choice.schemes, self.largest, directory, tell)
        nbytes = built.nbytes
        report = self.job.measure(directory, tell)
        self.rest, total = int(nbytes - choice.nbytes) + self._others, nbytes + self._others
        holds = report.kl <= self.budget.max_kl and total + _LATER <= self.budget.max_bytes
        attempt = Attempt(choice, choice.kl * self.ratio, report, total, holds, directory)
        self.ratio = max(report.kl, 1e-12) / max(choice.kl, 1e-12)
        self.attempts.append(attempt)
        if not holds:
            shutil.rmtree(directory)
        return attempt, built

    def _keep(self, best: Attempt) -> Attempt:
        """Leave one attempt's files, and no other's, in the bundle's directory."""
        for file in best.directory.iterdir():
            file.rename(self.directory / file.name)
        for attempt in self.attempts:
            shutil.rmtree(attempt.directory, ignore_errors=True)
        return best

    def _what_can_be_met(self) -> str:
        """One sentence with the nearest budgets that could be kept to."""
        budget, limit = self.budget, self.budget.max_bytes - _LATER - self.rest
        sizes = dataclasses.replace(self.table, cost=self.table.nbytes)
        said = []
        if (best := search(self.finest, math.inf, limit)) is not None:
            said.append(f"KL {self._kl(best):.2g} at {self._mb(best):.1f} MB")
        if (least := search(sizes, budget.max_kl / self.ratio)) is not None:
            said.append(f"{self._mb(least):.1f} MB at KL {self._kl(least):.2g}")
        finest, smallest = search(self.finest, math.inf), search(sizes, math.inf)
        if least is None and finest is not None and (best is None or finest.schemes != best.schemes):
            said.append(f"KL {self._kl(finest):.2g} at {self._mb(finest):.1f} MB")
        if best is None and smallest is not None and (least is None or smallest.schemes != least.schemes):
            said.append(f"at the very least {self._mb(smallest):.1f} MB, at KL {self._kl(smallest):.2g}")
        size = "" if budget.max_size_mb is None else f" and {budget.max_size_mb:g} MB"
        how = "corrected by what was measured" if self.attempts else "by the estimate"
        measured = "".join(
            f"; measured: KL {a.report.kl:.2g} at {self._mb(a.choice):.1f} MB"
            for a in sorted(self.attempts, key=lambda a: a.report.kl)[:1]
        )
        return (
            f"no formats keep to KL {budget.max_kl:g}{size}; what can be met, {how}: {', or '.join(said)}{measured}; "
            "give --max-kl or --max-size-mb accordingly, with some margin"
        )

    def _kl(self, choice: Choice) -> float:
        return choice.kl * self.ratio

    def _mb(self, choice: Choice) -> float:
        return (choice.nbytes + self.rest + _LATER) / 1e6
