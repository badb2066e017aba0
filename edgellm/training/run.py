"""A whole run from files to checkpoints, of whichever kind its configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgellm.tasks.chats import holds_chats
from edgellm.training.chat_run import train_chats
from edgellm.training.progress import StepReport
from edgellm.training.run_config import RunConfig
from edgellm.training.task_run import train_task
from edgellm.training.text_run import train_text
from edgellm.training.trainer import TrainResult

__all__ = ["train_from_text"]


def train_from_text(
    config: RunConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] | None = None,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Train on text, on chats, or on the examples of a task, from files to checkpoints.

    Args:
        config: the run.
        out: its folder; besides what :func:`edgellm.training.train` writes it holds ``run.json`` and ``data``.
        resume: go on with the run that is there.
        say: told in a sentence what is being done, in the first process.
        on_progress: as in :func:`edgellm.training.train`.

    Raises:
        TrainingError: text or options that cannot be used, or a run that is already there.
        ConfigError: an impossible model.
    """
    return _kind(config)(config, out, resume=resume, say=say, on_progress=on_progress)


def _kind(config: RunConfig) -> Callable[..., TrainResult]:
    if config.task not in ("", "generation"):
        return train_task
    return train_chats if holds_chats(config.texts) else train_text
