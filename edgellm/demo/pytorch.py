"""PyTorch on the workload of ``edgellm bench``: ``python -m edgellm.demo.pytorch CHECKPOINT``.

The same steps on the same model definition in eager mode, float32: a new state, a prompt of random tokens, the choice
of the first token (TTFT), then one token at a time over the model's own state. One unmeasured round, then medians.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from edgellm.checkpoints import load_checkpoint
from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm_runtime.checks.memory import peak_rss_mb
from edgellm_runtime.threads import thread_count

__all__ = ["measure"]


def measure(
    model: LanguageModel, *, prompt_tokens: int, new_tokens: int, rounds: int, seed: int = 0
) -> dict[str, float]:  # fmt: skip
    """Time a model.

    Args:
        model: in eval mode.
        prompt_tokens: length of the prompt.
        new_tokens: steps after the first token.
        rounds: measured rounds, after one that is not.
        seed: of the random prompts.

    Returns:
        ``ttft_ms`` and ``decode_tokens_per_s``, medians over the rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator) for _ in range(rounds + 1)
    ]
    measured = []
    for number, row in enumerate(rows):
        click.echo(f"    round {number} of {rounds}" if number else "    a round that does not count", err=True)
        measured.append(_round(model, row, new_tokens))
    measured = measured[1:]
    return {
        "ttft_ms": round(1e3 * statistics.median(first for first, _ in measured), 2),
        "decode_tokens_per_s": round(new_tokens / statistics.median(rest for _, rest in measured), 1),
    }


@torch.inference_mode()
def _round(model: LanguageModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of all further ones."""
    start = time.perf_counter()
    state: Any = empty_state(model, 1, prompt.shape[1] + new_tokens)
    tokens, state = _step(model, prompt, state, 0)
    first = time.perf_counter()
    for past in range(prompt.shape[1], prompt.shape[1] + new_tokens):
        tokens, state = _step(model, tokens, state, past)
    return first - start, time.perf_counter() - first


def _step(model: LanguageModel, tokens: Tensor, state: Any, past: int) -> tuple[Tensor, Any]:
    """The most likely next token, (1, 1), and the new state."""
    step = Step.whole(tokens)
    step = step._replace(past_lengths=step.past_lengths + past, logit_positions=step.logit_positions[:, -1:])
    logits, state = model(tokens, state, step)
    return logits[:, -1].argmax(dim=-1, keepdim=True), state


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=int, default=128, help="Prompt length.")
@click.option("--new-tokens", type=int, default=128, help="Steps after it.")
@click.option("--threads", type=int, default=None, help="CPU threads.")
@click.option("--rounds", type=int, default=5, help="Measured rounds, after one that is not.")
def main(checkpoint: Path, prompt_tokens: int, new_tokens: int, threads: int | None, rounds: int) -> None:
    """Measure CHECKPOINT in PyTorch and print one JSON object."""
    torch.set_num_threads(thread_count(threads))
    start = time.perf_counter()
    model: Any = load_checkpoint(checkpoint).model
    load_s = round(time.perf_counter() - start, 3)
    result = measure(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    click.echo(
        json.dumps(
            {"load_s": load_s, **result, "peak_rss_mb": peak_rss_mb(), "torch": torch.__version__}, allow_nan=False
        )
    )


if __name__ == "__main__":
    main()
