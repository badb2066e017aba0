"""What a checkpoint holds once it is read, whatever its format was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from edgellm.checkpoints.weights import CheckpointWeights
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A model with its weights, and what text needs to get in and out of it.

    Args:
        architecture: its name in :mod:`edgellm.models.registry`.
        model: in evaluation mode; with ``weights``, its parameters are on the meta device.
        tokenizer_json: the text of a ``tokenizer.json``, or None.
        chat_template: Jinja source, or None.
        bos_token_id: the token that begins a text, or None.
        eos_token_ids: the tokens that end one; the first is the usual one.
        add_bos: whether plain text is to begin with ``bos_token_id``; it says so for text encoded *without* special
            tokens, whatever the tokenizer's own post-processor would add.
        add_eos: whether a plain source ends with the first of ``eos_token_ids``; of models that answer sources.
        source: where it came from, in a few words for people.
        weights: reads the parameters, or None: the model holds them.
        task: what it was trained to do, or None: to go on with a text.
        special_tokens: the tokenizer's own names of its special tokens, such as ``{"pad_token": "<pad>"}``; chat
            templates write them.
        generation: options of generation that its makers ask for; see :mod:`edgellm_runtime.option_ranges`.
        notes: what whoever exports it should know, a sentence each.
        apart: whether blocks that its configuration has once have weights of their own at each place, because an
            adapter changes them.
    """

    architecture: str
    model: nn.Module
    tokenizer_json: str | None
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    source: str
    weights: CheckpointWeights | None = None
    task: TaskSpec | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    add_eos: bool = False
    apart: bool = False
