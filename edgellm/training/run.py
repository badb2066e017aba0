"""A whole run from text files to checkpoints, and the record that lets it be resumed by its folder alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edgellm.errors import TrainingError
from edgellm.models import registry
from edgellm.training.corpus import Corpus
from edgellm.training.distributed import open_world
from edgellm.training.options import TrainOptions
from edgellm.training.progress import StepReport
from edgellm.training.tokenizer import train_tokenizer
from edgellm.training.tokens import HEADER, PARTS, prepare_tokens
from edgellm.training.trainer import BEST, LAST, PLOT, TrainResult, holds_run, train
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["RunConfig", "check_folder", "train_from_text"]

RECORD, DATA, TOKENIZER = "run.json", "data", "tokenizer.json"
WRITTEN = (RECORD, LAST, BEST, PLOT, *(f"{DATA}/{name}" for name in (TOKENIZER, HEADER, *(f"{p}.bin" for p in PARTS))))
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is made from.

    Args:
        texts: files to train on.
        validation_texts: files to validate on; empty: a part of ``texts``.
        validation_fraction: that part.
        architecture: a name in the registry.
        model: the model's configuration, as its ``to_json`` gives it; ``vocab_size`` is the most the tokenizer gets.
        options: how to train.
        task: a name of :data:`edgellm_runtime.task_spec.FIELDS`; empty: a language model on plain text.
        init: a checkpoint to begin with, whose model and tokenizer are kept; None: fresh weights.
        lora: rank of adapters to learn through; 0: all weights learn.
        lora_alpha: how much adapters count; 0: twice the rank.
    """

    texts: tuple[Path, ...]
    validation_texts: tuple[Path, ...] = ()
    validation_fraction: float = 0.1
    architecture: str
    model: Mapping[str, Any]
    options: TrainOptions
    task: str = ""
    init: Path | None = None
    lora: int = 0
    lora_alpha: float = 0.0

    def save(self, out: Path) -> None:
        """Write it into a run's folder."""
        record = {
            "format": FORMAT,
            "texts": [str(path.absolute()) for path in self.texts],
            "validation_texts": [str(path.absolute()) for path in self.validation_texts],
            "validation_fraction": self.validation_fraction,
            "architecture": self.architecture,
            "model": dict(self.model),
            "options": self.options.to_json(),
            "task": self.task,
            "init": None if self.init is None else str(self.init.absolute()),
            "lora": self.lora,
            "lora_alpha": self.lora_alpha,
        }
        out.mkdir(parents=True, exist_ok=True)
        pending = out / f"{RECORD}.tmp"
        pending.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        pending.replace(out / RECORD)

    @classmethod
    def load(cls, out: Path) -> RunConfig:
        """Read it from a run's folder.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        path = out / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise TrainingError(f"{path}: format {record['format']}, this edgellm reads {FORMAT}; start anew")
            return cls(
                texts=tuple(map(Path, record["texts"])),
                validation_texts=tuple(map(Path, record["validation_texts"])),
                validation_fraction=record["validation_fraction"],
                architecture=record["architecture"],
                model=record["model"],
                options=TrainOptions.from_json(record["options"]),
                task=record.get("task", ""), init=Path(record["init"]) if record.get("init") else None,
                lora=record.get("lora", 0), lora_alpha=record.get("lora_alpha", 0.0),
            )  # fmt: skip
        except FileNotFoundError:
            raise TrainingError(f"{out} holds no run to resume; leave out --resume to start one") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is damaged ({error}); start the run again in another folder") from None


def train_from_text(
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
    if config.task not in ("", "generation"):
        from edgellm.training.task_run import train_task

        return train_task(config, out, resume=resume, say=say, on_progress=on_progress)
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
