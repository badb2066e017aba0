"""Telling how a run goes: a bar on a terminal, and now and then a plain line anywhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Reporter", "StepReport"]

LINE_EVERY = 10.0  # seconds between plain lines


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Args:
        step: updates done.
        steps: updates in all.
        loss: nats a token on the step's windows.
        lr: the learning rate.
        grad_norm: before clipping; None on a step that float16's scaler left out.
        tokens_per_s: tokens trained on in a second, over all processes.
        val_loss: nats a token, on the steps that validate.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    val_loss: float | None = None


class Reporter:
    """Shows each :class:`StepReport` on a console, which should be standard error.

    Args:
        console: where; a bar if it is a terminal, otherwise a line every ten seconds and at each validation.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._val_loss: float | None = None
        self._next_line = 0.0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __call__(self, report: StepReport) -> None:
        self._val_loss = report.val_loss if report.val_loss is not None else self._val_loss
        if self.console.is_terminal:
            self._draw(report)
        elif time.monotonic() >= self._next_line or report.val_loss is not None or report.step == report.steps:
            self._next_line = time.monotonic() + LINE_EVERY
            self.say(f"step {report.step}/{report.steps}  {self._numbers(report)}")

    def _numbers(self, report: StepReport) -> str:
        validation = "" if self._val_loss is None else f"  validation {self._val_loss:.4f}"
        return f"loss {report.loss:.4f}{validation}  {report.tokens_per_s:,.0f} tokens/s"

    def _draw(self, report: StepReport) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.description}"),
                TextColumn("ETA"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._bar.add_task("", total=report.steps, completed=report.step - 1)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=report.step, description=self._numbers(report))
