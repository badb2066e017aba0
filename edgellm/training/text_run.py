"""A whole run on plain text: tokenizer, tokens, model, training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from edgellm.errors import TrainingError
from edgellm.models import registry
from edgellm.training.corpus import Corpus
from edgellm.training.distributed import open_world
from edgellm.training.progress import StepReport
from edgellm.training.run_config import DATA, TOKENIZER, RunConfig
from edgellm.training.run_folder import check_folder
from edgellm.training.tokenizer import train_tokenizer
from edgellm.training.tokens import prepare_tokens
from edgellm.training.trainer import TrainResult, train
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["train_text"]


def train_text(
    config: RunConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] | None = None,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Train a tokenizer, encode the text, build the model and train it.

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
    if config.init is not None or config.lora:
        raise TrainingError("a checkpoint to begin with needs a task other than generation; name one with --task")
    architecture = registry.find(config.architecture)
    architecture.config.from_json(config.model)  # an impossible model fails here, before any work
    corpus = Corpus(
        files=config.texts, validation_files=config.validation_texts, validation_fraction=config.validation_fraction
    )
    with open_world(config.options.device) as world:
        world.first(lambda: _prepare(config, corpus, out, resume, say or (lambda sentence: None)))
        tokenizer = Tokenizer.from_file(str(out / DATA / TOKENIZER))
        data = prepare_tokens(corpus, tokenizer, out / DATA)  # made above, so this only opens it
        torch.manual_seed(config.options.seed)
        model = architecture.build(
            architecture.config.from_json({**config.model, "vocab_size": tokenizer.get_vocab_size()})
        )
        return train(
            model, data, config.options, out, architecture=config.architecture, tokenizer=tokenizer, resume=resume,
            on_progress=on_progress, task=TaskSpec(name="generation") if config.task else None,
        )  # fmt: skip


def _prepare(config: RunConfig, corpus: Corpus, out: Path, resume: bool, say: Callable[[str], None]) -> None:
    if not resume:
        check_folder(out)
    if resume:  # only what may change is recorded, so that a mistaken resume spoils nothing
        before = RunConfig.load(out)
        config.options.check_resumes(before.options)
        dataclasses.replace(before, options=config.options).save(out)
    else:
        config.save(out)
    path = out / DATA / TOKENIZER
    if resume and path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = train_tokenizer(corpus.train(), config.model["vocab_size"])
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = path.with_name(f"{TOKENIZER}.tmp")
        pending.write_text(tokenizer.to_str(), encoding="utf-8")
        pending.replace(path)
    data = prepare_tokens(corpus, tokenizer, out / DATA)
    data.check(config.options.context)
    say(
        f"{len(data.train):,} tokens to train on, {len(data.validation):,} to validate on ({data.split}), "
        f"vocabulary {tokenizer.get_vocab_size():,}"
    )
