"""Every error that defining, loading or training a model raises on purpose.

ModelError
├── ConfigError       a configuration value that no model can have
├── CheckpointError   a checkpoint that is missing, damaged, foreign or does not fit its configuration
│   └── UnsupportedError   a sound one that asks for what no architecture of edgellm's own computes
├── OpError           an op whose definition contradicts itself, or a node that is none of it
└── TrainingError     data or options that training cannot use
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "ModelError", "OpError", "TrainingError", "UnsupportedError"]


_LONGEST, _ENDS = 1500, 700  # characters of a text, and of each of its ends where it is longer


class ModelError(Exception):
    """Base of this package's errors; its text is one sentence with the thing, the value and the remedy.

    A value out of someone's file may be a million characters long: the middle of such a text is left out.
    """

    def __str__(self) -> str:
        said = super().__str__()
        return said if len(said) <= _LONGEST else f"{said[:_ENDS]} … {said[-_ENDS:]}"


class ConfigError(ModelError, ValueError):
    """A configuration value is outside what it may be."""


class CheckpointError(ModelError):
    """A checkpoint cannot be read as the model that it says it is."""


class UnsupportedError(CheckpointError):
    """A checkpoint is of an architecture, or has a setting of it, that none of edgellm's own architectures computes."""


class OpError(ModelError):
    """An op's definition contradicts itself, or a call or a node of it is none that the op knows."""


class TrainingError(ModelError):
    """Training cannot start or go on with this data or these options."""
