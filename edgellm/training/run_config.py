"""What a run is made from, and the record of it that lets it be resumed by its folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import TrainingError
from edgellm.training.options import TrainOptions

__all__ = ["DATA", "RECORD", "TOKENIZER", "RunConfig"]

RECORD, DATA, TOKENIZER = "run.json", "data", "tokenizer.json"
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
        tokenizer: a ``tokenizer.json`` for fresh weights; None: one is trained on ``texts``.
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
    tokenizer: Path | None = None
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
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer.absolute()),
            "lora": self.lora,
            "lora_alpha": self.lora_alpha,
        }
        out.mkdir(parents=True, exist_ok=True)
        pending = out / f"{RECORD}.tmp"
        pending.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
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
                tokenizer=Path(record["tokenizer"]) if record.get("tokenizer") else None,
                lora=record.get("lora", 0), lora_alpha=record.get("lora_alpha", 0.0),
            )  # fmt: skip
        except FileNotFoundError:
            raise TrainingError(f"{out} holds no run to resume; leave out --resume to start one") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} is damaged ({error}); start the run again in another folder") from None
