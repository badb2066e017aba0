"""A whole run on a task's examples: tokenizer, prompts, model, training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from edgellm.errors import TrainingError
from edgellm.models.protocol import answers_sources
from edgellm.tasks.encode import EncodedExamples, class_weights_of, encode_examples
from edgellm.tasks.examples import Example, read_examples
from edgellm.tasks.specs import make_spec, target_of, texts_of
from edgellm.training.distributed import open_world
from edgellm.training.example_batches import ExampleBatches
from edgellm.training.progress import StepReport
from edgellm.training.run_config import RunConfig
from edgellm.training.run_folder import record_run
from edgellm.training.start import Start, prepare_tokenizer, start_of
from edgellm.training.trainer import TrainResult, train
from edgellm_runtime.task_spec import ANSWER, PREDICATE, SEPARATOR, TaskSpec

__all__ = ["train_task"]

_LONGEST_SHARE = 0.99  # of the answers; what is longer is left out


def train_task(
    config: RunConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] | None = None,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Train a model for a task, from fresh weights or from a checkpoint.

    Args:
        config: the run; its texts are JSON Lines of examples.
        out: its folder.
        resume: go on with the run that is there.
        say: told in a sentence what is being done, in the first process.
        on_progress: as in :func:`edgellm.training.train`.

    Raises:
        TrainingError: examples or options that cannot be used, or a run that is already there.
        ConfigError: an impossible model.
        CheckpointError: a checkpoint to begin with that cannot be read.
    """
    with open_world(config.options.device) as world:
        training, validation = _read(config)
        world.first(lambda: _record(config, training, out, resume))
        start = start_of(config, out)
        spec, batches = _encoded(config, start, training, validation, say if say and world.is_first else _silent)
        torch.manual_seed(config.options.seed)
        model = start.build(**({"num_labels": len(spec.labels)} if spec.labels else {}))
        _check_room(model, config.options.context)
        return train(
            model, batches, config.options, out, architecture=start.architecture, tokenizer=start.tokenizer, task=spec,
            text=start.text, resume=resume, on_progress=on_progress,
        )  # fmt: skip


def _check_room(model: Any, context: int) -> None:
    """Make sure that a model that answers sources takes those of such a context."""
    if answers_sources(model) and context > (most := min(model.config.max_source, model.config.max_context)):
        raise TrainingError(
            f"context {context} is over the model's {most} tokens of a source or of an answer; lower it, or raise "
            "max_source and max_context"
        )


def _silent(sentence: str) -> None:
    pass


def _read(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """The examples, and those held out: files of their own, or every n-th example."""
    found = [e for path in config.texts for e in read_examples(path, config.task)]
    if config.validation_texts:
        return found, [e for path in config.validation_texts for e in read_examples(path, config.task)]
    every = round(1 / config.validation_fraction)
    held_out = found[every - 1 :: every]
    if not held_out:
        raise TrainingError(f"{len(found)} examples are too few to hold some out; give more, or --validation FILE")
    return [e for i, e in enumerate(found) if (i + 1) % every], held_out


def _record(config: RunConfig, training: Sequence[Example], out: Path, resume: bool) -> None:
    """Write the run's record and its tokenizer."""
    record_run(config, out, resume=resume)
    prepare_tokenizer(
        config, out, lambda: (text for e in training for text in texts_of(config.task, e)),
        (SEPARATOR, ANSWER, PREDICATE), resume=resume,
    )  # fmt: skip


def _encoded(
    config: RunConfig, start: Start, training: Sequence[Example], validation: Sequence[Example],
    say: Callable[[str], None],
) -> tuple[TaskSpec, ExampleBatches]:  # fmt: skip
    """The task's form, and its examples as tokens."""
    options, tokenizer = config.options, start.tokenizer
    added = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    tokenizer.encode_special_tokens = True  # names of special tokens in a text are the characters they are

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    answers = 1
    if config.task != "srl":
        lengths = sorted(len(encode(target_of(config.task, e))) + 1 for e in training[:: max(1, len(training) // 5000)])
        most = options.context - len(start.start_tokens) if start.start_tokens else options.context // 2
        answers = min(lengths[int(_LONGEST_SHARE * (len(lengths) - 1))], most)
    prompts = options.context if start.start_tokens else options.context - answers  # sources are rows of their own
    spec = make_spec(
        config.task, training, added.get, max_prompt=prompts, max_new_tokens=answers
    )  # fmt: skip
    weights = class_weights_of(spec, training) if options.class_weights == "balanced" else None
    parts: list[EncodedExamples] = [
        encode_examples(
            spec,
            encode,
            added.get,
            start.end,
            examples,
            prompt_loss=options.prompt_loss,
            class_weights=weights,
            start=start.start_tokens,
            once=start.one_pass,
        )
        for examples in (training, validation)
    ]
    for name, part in zip(("train", "validate"), parts, strict=True):
        tokens = sum(row.size for row in part.rows)
        fates = f"{part.shortened:,} shortened and {part.dropped:,} too long for a context of {options.context}"
        say(f"{len(part.rows):,} examples to {name} on, {tokens:,} tokens; {fates}")
    size = tokenizer.get_vocab_size()
    width = len(spec.labels) or size
    return spec, ExampleBatches(parts[0].rows, parts[1].rows, vocab_size=size, width=width)
