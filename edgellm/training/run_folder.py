"""The folder of a run: what is written into it, and whether a run may begin there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgellm.errors import TrainingError
from edgellm.training.run_config import DATA, RECORD, TOKENIZER, RunConfig
from edgellm.training.tokens import HEADER, PARTS
from edgellm.training.trainer import BEST, LAST, PLOT, holds_run

__all__ = ["WRITTEN", "check_folder", "record_run"]

WRITTEN = (RECORD, LAST, BEST, PLOT, *(f"{DATA}/{name}" for name in (TOKENIZER, HEADER, *(f"{p}.bin" for p in PARTS))))


def check_folder(out: Path) -> None:
    """Refuse to begin a run where one is, or where it would write over files that are no run's.

    Raises:
        TrainingError: it would.
    """
    if holds_run(out):
        raise TrainingError(f"{out} already holds a run; resume it with --resume, or choose another folder")
    if taken := [name for name in WRITTEN if (out / name).exists()]:
        try:
            RunConfig.load(out)  # of a run that ended before its first step
        except TrainingError:
            raise TrainingError(
                f"{out} holds {taken[0]}, which no run wrote and a run would write over; choose another folder"
            ) from None


def record_run(config: RunConfig, out: Path, *, resume: bool) -> None:
    """Write what a run is made from into its folder; of one that is resumed, only what may change.

    Raises:
        TrainingError: a run that cannot begin there, or be resumed so.
    """
    if not resume:
        check_folder(out)
        config.save(out)
        return
    before = RunConfig.load(out)  # a mistaken resume spoils nothing
    config.options.check_resumes(before.options)
    dataclasses.replace(before, options=config.options).save(out)
