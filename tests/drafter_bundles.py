"""Tiny bundles with a drafter that nobody has trained, and the means to have it draft all the same."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from tiny_bundles import HIDDEN_KINDS, _make

from edgellm.draft_head import DraftHead, DraftHeadConfig
from edgellm_runtime.generation.pace import Pace


def untrained(vocab_size: int, features: int = 32, listed: int = 50) -> DraftHead:
    torch.manual_seed(5)
    return DraftHead(DraftHeadConfig(features, vocab_size, listed, width=32, token_width=32)).eval()


def head_for(kind: str) -> DraftHead:
    """Begun from what the model knows."""
    model = HIDDEN_KINDS[kind][0]()
    head = untrained(model.config.vocab_size)
    table, rows, features = model.embedding.weight.detach(), model.head.weight.detach(), head.config.features
    head.start_from(table, rows, torch.zeros(features), torch.ones(features))
    return head


@functools.cache
def drafter_bundle(kind: str = "attention", quantize: str = "none") -> Path:
    model, text = HIDDEN_KINDS[kind]
    return _make(model, "cpu", text(), hidden=True, quantize=quantize, drafter=head_for(kind))


def draft_always(monkeypatch: pytest.MonkeyPatch, length: int = 4) -> None:
    """So many tokens at every step, whether it pays or not."""
    monkeypatch.setattr(Pace, "worth", lambda self, chance: True)
    monkeypatch.setattr(Pace, "length", lambda self, kind: length)
