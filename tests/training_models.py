"""What the training tests share: a small text, its tokens, a small model, and a run as a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm.training import Corpus, TokenData, TrainOptions, TrainResult, prepare_tokens, train, train_tokenizer

VOCABULARY = 300
TEXT = "".join(f"{i} green bottles hanging on the wall, and if one should fall: {i - 1}.\n" for i in range(200, 0, -1))


def options(**changes: Any) -> TrainOptions:
    values: dict[str, Any] = {
        "steps": 8, "batch_size": 4, "context": 16, "lr": 1e-2, "warmup": 2, "eval_every": 4, "eval_batches": 2,
        "save_every": 3, "device": "cpu", "seed": 5,
    }  # fmt: skip
    return TrainOptions(**{**values, **changes})


def model(*, dropout: float = 0.1) -> Hybrid:
    torch.manual_seed(7)
    return Hybrid(
        HybridConfig(
            vocab_size=VOCABULARY, width=32, pattern=("gru", "attention"), num_heads=2, num_kv_heads=2,
            recurrent_width=32, mlp_width=32, max_context=32, dropout=dropout, tie_embeddings=True,
        )
    )  # fmt: skip


def data(directory: Path) -> tuple[TokenData, Tokenizer]:
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "text.txt"
    if not text.exists():
        text.write_text(TEXT, encoding="utf-8")
    corpus = Corpus(files=[text])
    tokenizer = train_tokenizer(corpus.train(), VOCABULARY)
    return prepare_tokens(corpus, tokenizer, directory / "tokens"), tokenizer


def run(directory: Path, out: Path, *, dropout: float = 0.1, **how: Any) -> TrainResult:
    """Train the small model; ``how`` holds arguments of ``train`` and changes of the options."""
    arguments = {name: how.pop(name) for name in ("resume", "on_progress") if name in how}
    tokens, tokenizer = data(directory)
    return train(
        model(dropout=dropout), tokens, options(**how), out, architecture="hybrid", tokenizer=tokenizer, **arguments
    )


def curve(out: Path) -> list[tuple[float | None, ...]]:
    """What must not change between two runs of the same seed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in ("step", "loss", "lr", "grad_norm", "val_loss")) for line in lines]
