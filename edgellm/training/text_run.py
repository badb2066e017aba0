"""A whole run on plain text: tokenizer, tokens, model, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from edgellm.models import registry
from edgellm.training.corpus import Corpus
from edgellm.training.distributed import open_world
from edgellm.training.progress import StepReport
from edgellm.training.run_config import DATA, RunConfig
from edgellm.training.run_folder import record_run
from edgellm.training.start import Start, prepare_tokenizer, start_of
from edgellm.training.tokens import prepare_tokens
from edgellm.training.trainer import TrainResult, train
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["train_text"]


def train_text(
    config: RunConfig, out: Path, *, resume: bool = False, say: Callable[[str], None] | None = None,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Encode the text with the checkpoint's tokenizer, the given one or one trained on it, and train the model.

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
    if config.init is None:  # an impossible model fails here, before any work
        registry.find(config.architecture).config.from_json(config.model)
    corpus = Corpus(
        files=config.texts, validation_files=config.validation_texts, validation_fraction=config.validation_fraction
    )
    with open_world(config.options.device) as world:
        world.first(lambda: _record(config, corpus, out, resume))
        start = start_of(config, out)
        world.first(lambda: _encode(config, corpus, start, out, say or (lambda sentence: None)))
        data = prepare_tokens(corpus, start.tokenizer, out / DATA, end=start.end)  # made above, so this only opens it
        torch.manual_seed(config.options.seed)
        return train(
            start.build(), data, config.options, out, architecture=start.architecture, tokenizer=start.tokenizer,
            resume=resume, on_progress=on_progress, task=TaskSpec(name="generation") if config.task else None,
            text=start.text,
        )  # fmt: skip


def _record(config: RunConfig, corpus: Corpus, out: Path, resume: bool) -> None:
    """Write the run's record and its tokenizer."""
    record_run(config, out, resume=resume)
    prepare_tokenizer(config, out, corpus.train, resume=resume)


def _encode(config: RunConfig, corpus: Corpus, start: Start, out: Path, say: Callable[[str], None]) -> None:
    data = prepare_tokens(corpus, start.tokenizer, out / DATA, end=start.end)
    data.check(config.options.context)
    say(
        f"{len(data.train):,} tokens to train on, {len(data.validation):,} to validate on ({data.split}), "
        f"vocabulary {start.tokenizer.get_vocab_size():,}"
    )
