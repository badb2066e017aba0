"""Speed and memory of a bundle on this device: one prompt of random tokens, greedy, batch 1.

What is measured: a new state, the prompt and the choice of the first token (TTFT), then further steps. Each round draws
a new prompt, so that nothing cached can answer for the model; one unmeasured round comes first. Figures are medians.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.checks.memory import peak_rss_mb
from edgellm_runtime.errors import ContextError
from edgellm_runtime.generation.generate import next_tokens
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions
from edgellm_runtime.threads import thread_count

if TYPE_CHECKING:
    from edgellm_runtime.model import Model
    from edgellm_runtime.session import Session

__all__ = ["bench", "random_prompts"]

_TYPICAL_IDS = (1000, 40000)  # past the special and single-byte tokens that real prompts seldom consist of


def bench(
    model_or_path: Model | str | Path, *, prompt_tokens: int = 128, new_tokens: int = 128, threads: int | None = None,
    rounds: int = 5, device: str = "auto", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Measure a bundle.

    Args:
        model_or_path: a bundle's path, whose loading is measured too, or a loaded model.
        prompt_tokens: length of the prompt.
        new_tokens: steps after the first token.
        threads: for loading, as :func:`edgellm_runtime.load` takes them; a loaded model keeps its own, and ``threads``
            is None in the result.
        rounds: measured rounds, after one that is not.
        device: for loading.
        seed: of the random prompts.

    Returns:
        ``load_s`` (None for a loaded model), ``ttft_ms``, ``prefill_tokens_per_s``, ``decode_tokens_per_s``,
        ``itl_ms`` (inter-token latency: p50, p95, p99), ``peak_rss_mb`` of the whole process, ``device``,
        ``threads``, ``versions``, ``prompt_tokens``, ``new_tokens``, ``rounds``.

    Raises:
        OptionError: a count below 1.
        ContextError: prompt and new tokens do not fit into the context.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        check_integer(name, value, 1)
    load_s = None
    if isinstance(model_or_path, (str, Path)):
        from edgellm_runtime import load

        threads = thread_count(threads)
        start = time.perf_counter()
        model = load(model_or_path, device=device, threads=threads)
        load_s = round(time.perf_counter() - start, 3)
    else:
        model, threads = model_or_path, None
    session = model.session
    if prompt_tokens + new_tokens > session.max_context:
        raise ContextError(
            f"a prompt of {prompt_tokens} and {new_tokens} new tokens do not fit into the model's context of "
            f"{session.max_context}; measure fewer"
        )
    draw = random_prompts(session.vocab_size, prompt_tokens, seed)
    _round(session, draw(), new_tokens)
    measured = [_round(session, draw(), new_tokens) for _ in range(rounds)]
    return {
        "load_s": load_s, **_summary(measured, prompt_tokens), "peak_rss_mb": peak_rss_mb(), "device": session.device,
        "threads": threads, "versions": _versions(), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "rounds": rounds,
    }  # fmt: skip


def random_prompts(vocab_size: int, length: int, seed: int) -> Callable[[], NDArray[np.int64]]:
    """Gives a prompt of random tokens (1, length) at each call, another one each time."""
    rng = np.random.Generator(np.random.PCG64(seed))
    low, high = _TYPICAL_IDS[0] if vocab_size > 2 * _TYPICAL_IDS[0] else 0, min(_TYPICAL_IDS[1], vocab_size)
    return lambda: rng.integers(low, high, (1, length))


def _round(session: Session, prompt: NDArray[np.int64], new_tokens: int) -> tuple[float, NDArray[np.float64]]:
    """Seconds to the first token, and (new_tokens,) seconds of each further one."""
    sampler = Sampler(SamplingOptions(), rows=1, vocab_size=session.vocab_size)
    tokens = np.empty((1, 1), dtype=np.int64)
    ticks = np.empty(new_tokens + 1)
    start = time.perf_counter()
    state = session.new_state(1, prompt.shape[1] + new_tokens)
    tokens[:, 0] = sampler(session.step(prompt, state)[:, 0])
    ticks[0] = time.perf_counter()
    for i in range(1, new_tokens + 1):
        tokens[:, 0] = next_tokens(session, sampler, tokens, state, [0])
        ticks[i] = time.perf_counter()
    return float(ticks[0] - start), np.diff(ticks)


def _summary(measured: list[tuple[float, NDArray[np.float64]]], prompt_tokens: int) -> dict[str, Any]:
    first = statistics.median(m[0] for m in measured)
    decode = statistics.median(float(m[1].sum()) for m in measured)
    steps = 1e3 * np.concatenate([m[1] for m in measured])
    return {
        "ttft_ms": round(1e3 * first, 2),
        "prefill_tokens_per_s": round(prompt_tokens / first, 1),
        "decode_tokens_per_s": round(len(measured[0][1]) / decode, 1),
        "itl_ms": {f"p{q}": round(float(np.percentile(steps, q)), 3) for q in (50, 95, 99)},
    }


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    def version(*names: str) -> str | None:
        for name in names:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": version("onnxruntime", "onnxruntime-gpu"),
        "edgellm": version("edgellm"),
    }
