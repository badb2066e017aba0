"""Tiny models with tokenizers for tasks, in PyTorch and as bundles; random, unless a test trains them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

import edgellm_runtime
from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm.training.tokenizer import train_tokenizer
from edgellm_exporters.export import ExportOptions, TextAssets, export
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime.task_spec import ANSWER, PREDICATE, SEPARATOR, Segment, TaskSpec
from edgellm_runtime.tasks.runner import TaskRunner

PATTERNS = {"recurrent": ("lstm", "gru"), "attention": ("attention", "attention"), "hybrid": ("lstm", "attention")}
LABELS = ("O", "B-A0", "I-A0", "B-A1", "I-A1")
CONTEXT = 64
_FIELDS = {"translation": ("source",), "summarization": ("text", "length"), "qa": ("context", "question")}


@functools.cache
def tokenizer() -> Tokenizer:
    text = "the cat sat on the mat and the dog saw a bird in the old tree near our house yes no answer 1 2 3 "
    return train_tokenizer([text * 8], 320, (SEPARATOR, ANSWER, PREDICATE))


def spec_of(task: str, **changes: object) -> TaskSpec:
    marks = (SEPARATOR, ANSWER)
    pieces = [piece for i, name in enumerate(_FIELDS.get(task, ())) for piece in (("field", name), ("token", marks[i]))]
    values = {
        "name": task, "prompt": tuple(Segment(*piece) for piece in pieces), "max_prompt": 32, "max_new_tokens": 8,
        "labels": LABELS if task == "srl" else (), "cut": {"summarization": "text", "qa": "context"}.get(task, ""),
    }  # fmt: skip
    return TaskSpec(**{**values, **changes})  # type: ignore[arg-type]


def make(pattern: Sequence[str] = PATTERNS["hybrid"], labels: int = 0, vocab: int = 0) -> nn.Module:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=vocab or tokenizer().get_vocab_size(), width=32, pattern=tuple(pattern), num_heads=2, num_kv_heads=2,
        recurrent_width=32, max_context=CONTEXT, num_labels=labels,
    )  # fmt: skip
    model = Hybrid(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that some answers are likelier than others
    return model


def bundle(folder: Path, model: nn.Module, spec: TaskSpec, quantize: str = "none") -> edgellm_runtime.Model:
    text = TextAssets(tokenizer_json=tokenizer().to_str(), eos_token_ids=(0,), task=spec)
    path = export(model, folder / "bundle", options=ExportOptions(quantize=quantize), text=text).bundle.path  # type: ignore[arg-type]
    return edgellm_runtime.load(path, threads=1)


def in_pytorch(model: nn.Module, like: edgellm_runtime.Model) -> TaskRunner:
    assert like.tokenizer is not None and like.bundle.manifest.task is not None
    return TaskRunner(torch_session(model), like.tokenizer, like.bundle.manifest.task)  # type: ignore[arg-type]
