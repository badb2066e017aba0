"""A whole run on chats: a checkpoint that talks already learns to answer as the assistant of these chats does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from edgellm.errors import TrainingError
from edgellm.tasks.chats import Chat, Template, encode_chats, read_chats, template_of
from edgellm.training.distributed import open_world
from edgellm.training.example_batches import ExampleBatches
from edgellm.training.progress import StepReport
from edgellm.training.run_config import RunConfig
from edgellm.training.run_folder import record_run
from edgellm.training.start import Start, start_of
from edgellm.training.trainer import TrainResult, train

__all__ = ["train_chats"]


def train_chats(
    config: RunConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] | None = None,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Fine-tune a checkpoint on chats.

    Args:
        config: the run; its texts are JSON Lines of messages, its ``init`` is a checkpoint with a chat template.
        out: its folder.
        resume: go on with the run that is there.
        say: told in a sentence what is being done, in the first process.
        on_progress: as in :func:`edgellm.training.train`.

    Raises:
        TrainingError: chats or options that cannot be used, no template, or a run that is already there.
        CheckpointError: a checkpoint to begin with that cannot be read.
    """
    if config.init is None:
        raise TrainingError("chats teach a checkpoint that has a chat template; name one with --init")
    with open_world(config.options.device) as world:
        training, validation = _read(config)
        world.first(lambda: record_run(config, out, resume=resume))
        start = start_of(config, out)
        batches = _encoded(
            config, start, training, validation, say if say and world.is_first else lambda sentence: None
        )
        torch.manual_seed(config.options.seed)
        return train(
            start.build(), batches, config.options, out, architecture=start.architecture, tokenizer=start.tokenizer,
            text=start.text, resume=resume, on_progress=on_progress,
        )  # fmt: skip


def _read(config: RunConfig) -> tuple[list[Chat], list[Chat]]:
    """The chats, and those held out: files of their own, or every n-th chat."""
    found = [chat for path in config.texts for chat in read_chats(path)]
    if config.validation_texts:
        return found, [chat for path in config.validation_texts for chat in read_chats(path)]
    every = round(1 / config.validation_fraction)
    held_out = found[every - 1 :: every]
    if not held_out:
        raise TrainingError(f"{len(found)} chats are too few to hold some out; give more, or --validation FILE")
    return [chat for i, chat in enumerate(found) if (i + 1) % every], held_out


def _encoded(
    config: RunConfig, start: Start, training: Sequence[Chat], validation: Sequence[Chat], say: Callable[[str], None]
) -> ExampleBatches:
    size = start.tokenizer.get_vocab_size()
    with TemporaryDirectory() as scratch:
        template, context = _template(start, Path(scratch), size), config.options.context
        parts = [
            encode_chats(template, chats, context=context, prompt_loss=config.options.prompt_loss)
            for chats in (training, validation)
        ]
    for name, part in zip(("train", "validate"), parts, strict=True):
        tokens = sum(len(row.inputs) for row in part.rows)
        learned = int(sum((row.weights == 1).sum() for row in part.rows))
        say(f"{len(part.rows):,} chats to {name} on, {tokens:,} tokens, {learned:,} of them the assistant's; "
            f"{part.dropped:,} too long for a context of {context}")  # fmt: skip
    return ExampleBatches(parts[0].rows, parts[1].rows, vocab_size=size, width=size)


def _template(start: Start, scratch: Path, size: int) -> Template:
    source = start.text.get("chat_template")
    if source is None:
        raise TrainingError(f"{start.source} has no chat template; give another checkpoint, or chats as plain text")
    return template_of(
        source, start.tokenizer.to_str(), scratch, bos=start.text.get("bos_token_id"),
        ends=tuple(start.text["eos_token_ids"]), vocab_size=size,
    )  # fmt: skip
