"""What a checkpoint carries besides the model so that training goes on exactly as if it had not stopped.

The order of the data and dropout are functions of (seed, step), so the step and the optimizer are all there is.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from edgellm.errors import CheckpointError
from edgellm.training.options import TrainOptions

__all__ = ["TRAINER_FILE", "TrainerState", "load_trainer_state", "load_weights"]

TRAINER_FILE = "trainer.pt"
FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """A run between two updates.

    Args:
        step: updates done.
        options: as ``TrainOptions.to_json`` gives them.
        data: ``TokenData.fingerprint``.
        optimizer: its ``state_dict``.
        scaler: the gradient scaler's ``state_dict``.
        recent: training losses of the latest steps.
        val_loss: the latest validation loss.
        best_loss: the lowest validation loss.
        seconds: time spent training so far.
        stale: validations since the lowest loss.
        format: of this record.
    """

    step: int
    options: Mapping[str, Any]
    data: str
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    recent: list[float] = field(default_factory=list)
    val_loss: float = math.inf
    best_loss: float = math.inf
    seconds: float = 0.0
    stale: int = 0
    format: int = FORMAT

    def save(self, directory: Path) -> None:
        """Write it beside the model."""
        # not asdict: it would copy the optimizer's tensors
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, directory / TRAINER_FILE)

    def check(self, options: TrainOptions, fingerprint: str, directory: Path) -> None:
        """Make sure that the run would go on as it began.

        Raises:
            CheckpointError: other data.
            TrainingError: other options.
        """
        if self.data and fingerprint and self.data != fingerprint:
            raise CheckpointError(f"{directory}: the run was trained on other text; give the same files to resume it")
        options.check_resumes(TrainOptions.from_json(self.options))


def load_trainer_state(directory: Path, device: torch.device) -> TrainerState:
    """What :meth:`TrainerState.save` wrote.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = directory / TRAINER_FILE
    try:
        record = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, so training cannot resume from this checkpoint") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); start the run again in another folder") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT or record.keys() != TrainerState.__dataclass_fields__.keys():
        raise CheckpointError(f"{path}: format {found}, this edgellm reads {FORMAT}; start the run again elsewhere")
    return TrainerState(**record)


def load_weights(model: nn.Module, path: Path) -> None:
    """Put a checkpoint's tensors into a model of the same shape.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    try:
        tensors = load_file(path)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model ({error}); resume with the model it began with") from None
    state = model.state_dict(keep_vars=True)
    stored = {id(state[name]) for name in tensors if name in state}
    missing = [name for name in missing if id(state[name]) not in stored]  # a tied tensor is stored under one name
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:4])
        raise CheckpointError(f"{path}: tensors {names} do not fit; resume with the model it began with")
