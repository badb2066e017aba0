"""A whole run on a task's examples: tokenizer, prompts, model, training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import TrainingError
from edgellm.models import registry
from edgellm.tasks.encode import EncodedExamples, class_weights_of, encode_examples
from edgellm.tasks.examples import Example, read_examples
from edgellm.tasks.specs import make_spec, target_of, texts_of
from edgellm.training.distributed import open_world
from edgellm.training.example_batches import ExampleBatches
from edgellm.training.lora import adapt
from edgellm.training.progress import StepReport
from edgellm.training.run_config import DATA, TOKENIZER, RunConfig
from edgellm.training.run_folder import check_folder
from edgellm.training.tokenizer import end_of_text_id, train_tokenizer
from edgellm.training.trainer import TrainResult, train
from edgellm_runtime.task_spec import ANSWER, PREDICATE, SEPARATOR, TaskSpec

__all__ = ["train_task"]

_LONGEST_SHARE = 0.99  # of the answers; what is longer is left out


@dataclass(frozen=True)
class _Start:
    """What training begins with, besides the data."""

    model: Callable[[TaskSpec], nn.Module]
    architecture: str
    tokenizer: Tokenizer
    end: int
    text: dict[str, Any]  # what checkpoints say of the tokenizer


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
        start = _from_checkpoint(config.init) if config.init else _fresh(config, out)
        spec, batches = _encoded(config, start, training, validation, say if say and world.is_first else _silent)
        torch.manual_seed(config.options.seed)
        model = start.model(spec)
        if config.lora:
            adapt(model, config.lora, config.lora_alpha or 2.0 * config.lora)
        return train(
            model, batches, config.options, out, architecture=start.architecture, tokenizer=start.tokenizer, task=spec,
            text=start.text, resume=resume, on_progress=on_progress,
        )  # fmt: skip


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
    if not resume:
        check_folder(out)
    if resume:  # only what may change is recorded, so that a mistaken resume spoils nothing
        before = RunConfig.load(out)
        config.options.check_resumes(before.options)
        dataclasses.replace(before, options=config.options).save(out)
    else:
        config.save(out)
    path = out / DATA / TOKENIZER
    if config.init is None and not (resume and path.exists()):
        texts = (text for e in training for text in texts_of(config.task, e))
        tokenizer = train_tokenizer(texts, config.model["vocab_size"], (SEPARATOR, ANSWER, PREDICATE))
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = path.with_name(f"{TOKENIZER}.tmp")
        pending.write_text(tokenizer.to_str(), encoding="utf-8")
        pending.replace(path)


def _fresh(config: RunConfig, out: Path) -> _Start:
    tokenizer = Tokenizer.from_file(str(out / DATA / TOKENIZER))
    architecture = registry.find(config.architecture)
    size = {"vocab_size": tokenizer.get_vocab_size()}

    def build(spec: TaskSpec) -> nn.Module:
        labels = {"num_labels": len(spec.labels), "tie_embeddings": False} if spec.labels else {}
        return architecture.build(architecture.config.from_json({**config.model, **size, **labels}))

    end = end_of_text_id(tokenizer)
    return _Start(build, config.architecture, tokenizer, end, {"eos_token_ids": (end,)})


def _from_checkpoint(path: Path) -> _Start:
    loaded = load_checkpoint(path)
    if loaded.tokenizer_json is None or not loaded.eos_token_ids:
        raise TrainingError(f"{path} has no tokenizer, or none with an end token; begin with another checkpoint")
    text = {
        "eos_token_ids": loaded.eos_token_ids, "bos_token_id": loaded.bos_token_id, "add_bos": loaded.add_bos,
        "chat_template": loaded.chat_template,
    }  # fmt: skip

    def model(spec: TaskSpec) -> nn.Module:
        if spec.labels:
            raise TrainingError(f"{path} predicts tokens and cannot be taught labels; train srl from fresh weights")
        return loaded.model.float()

    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    return _Start(model, loaded.architecture, tokenizer, loaded.eos_token_ids[0], text)


def _encoded(
    config: RunConfig, start: _Start, training: Sequence[Example], validation: Sequence[Example],
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
        answers = min(lengths[int(_LONGEST_SHARE * (len(lengths) - 1))], options.context // 2)
    spec = make_spec(
        config.task, training, added.get, max_prompt=options.context - answers, max_new_tokens=answers
    )  # fmt: skip
    weights = class_weights_of(spec, training) if options.class_weights == "balanced" else None
    parts: list[EncodedExamples] = [
        encode_examples(
            spec, encode, added.get, start.end, examples, prompt_loss=options.prompt_loss, class_weights=weights
        )
        for examples in (training, validation)
    ]
    for name, part in zip(("train", "validate"), parts, strict=True):
        tokens = sum(len(row.inputs) for row in part.rows)
        fates = f"{part.shortened:,} shortened and {part.dropped:,} too long for a context of {options.context}"
        say(f"{len(part.rows):,} examples to {name} on, {tokens:,} tokens; {fates}")
    size = tokenizer.get_vocab_size()
    width = len(spec.labels) or size
    return spec, ExampleBatches(parts[0].rows, parts[1].rows, vocab_size=size, width=width)
