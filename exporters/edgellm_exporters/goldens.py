"""Goldens: what PyTorch computes for a few rows of tokens, sampled small enough to travel in the bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm_runtime.verify import GOLDENS

__all__ = ["greedy_tokens", "write_goldens"]

_TOP, _STATE_SAMPLES, _GREEDY = 8, 16, 16


def write_goldens(model: LanguageModel, rows: Sequence[Sequence[int]], directory: Path) -> None:
    """Run PyTorch over rows of tokens and write what it computed.

    Args:
        model: the reference, in eval mode.
        rows: token ids, at least two each.
        directory: of the bundle.
    """
    traces = [_trace(model, torch.tensor([list(row)])) for row in rows]
    (directory / GOLDENS).write_text(json.dumps({"format": 1, "traces": traces}))


@torch.no_grad()
def _trace(model: LanguageModel, tokens: Tensor) -> dict[str, Any]:
    room = min(_GREEDY, model.config.max_context - tokens.shape[1])
    logits, state = model(tokens, empty_state(model, 1, tokens.shape[1]), Step.whole(tokens))
    top = logits[0].double().topk(min(_TOP, logits.shape[-1]), dim=-1)
    generator = np.random.default_rng(0)
    samples = {}
    for spec in model.state_specs():
        flat = state[spec.name][0].reshape(-1).double()
        index = np.sort(generator.choice(len(flat), size=min(_STATE_SAMPLES, len(flat)), replace=False))
        samples[spec.name] = {"index": index.tolist(), "values": flat[torch.from_numpy(index)].tolist()}
    return {
        "tokens": tokens[0].tolist(),
        "top_ids": top.indices.tolist(),
        "top_logits": top.values.tolist(),
        "logsumexp": logits[0].double().logsumexp(-1).tolist(),
        "greedy": greedy_tokens(model, tokens[0].tolist(), room),
        "state": samples,
    }


@torch.no_grad()
def greedy_tokens(model: LanguageModel, prompt: Sequence[int], count: int) -> list[int]:
    """What PyTorch says next, the most likely token each time, token by token over its own state."""
    state: Any = empty_state(model, 1, len(prompt) + max(count, 1))
    tokens, past, said = torch.tensor([list(prompt)]), 0, []
    for _ in range(count):
        step = Step.whole(tokens)
        step = step._replace(past_lengths=step.past_lengths + past, logit_positions=step.logit_positions[:, -1:])
        logits, state = model(tokens, state, step)
        past += tokens.shape[1]
        said.append(int(logits[0, -1].argmax()))
        tokens = torch.tensor([[said[-1]]])
    return said
