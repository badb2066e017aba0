"""Speed and memory of a bundle on this device: prompts of random tokens, greedy.

What is measured: a new state, the prompt and the choice of the first token (TTFT), then further steps. Each round draws
a new prompt, so that nothing cached can answer for the model; one unmeasured round comes first. Figures are medians.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

__all__ = ["Round", "Workload", "bench", "random_prompts", "run_round", "summary", "versions"]

_TYPICAL_IDS = (1000, 40000)  # past the special and single-byte tokens that real prompts seldom consist of


@dataclass(frozen=True)
class Workload:
    """What one round does.

    Args:
        prompt_tokens: of each row's prompt.
        new_tokens: steps after the first token.
        depth: tokens that each row has read before the prompt; reading them is not measured.
        batch: rows, all of the same lengths.

    Raises:
        OptionError: a count below 1, or a depth below 0.
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    depth: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 1), ("depth", 0), ("batch", 1)):
            check_integer(name, getattr(self, name), least)

    def __str__(self) -> str:
        text = f"{self.prompt_tokens} + {self.new_tokens} tokens"
        text += f" after {self.depth}" if self.depth else ""
        return text + (f", {self.batch} rows" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        """Tokens of a row, all in all."""
        return self.depth + self.prompt_tokens + self.new_tokens

    def check(self, max_context: int) -> None:
        """Make sure that it fits.

        Raises:
            ContextError: it does not.
        """
        if self.tokens > max_context:
            before = f"{self.depth} tokens, " if self.depth else ""
            raise ContextError(
                f"{before}a prompt of {self.prompt_tokens} and {self.new_tokens} new tokens do not fit into the "
                f"model's context of {max_context}; measure fewer"
            )


@dataclass(frozen=True)
class Round:
    """What one round took.

    Args:
        ttft_s: seconds to the first token.
        steps_s: seconds of each further one.
        tokens_sha256: of all tokens that came out: two bundles that compute the same have the same.
    """

    ttft_s: float
    steps_s: tuple[float, ...]
    tokens_sha256: str

    @property
    def decode_s(self) -> float:
        """Seconds of all further tokens."""
        return sum(self.steps_s)


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
    workload = Workload(prompt_tokens, new_tokens)
    check_integer("rounds", rounds, 1)
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
    workload.check(session.max_context)
    measured = [run_round(session, workload, seed + number) for number in range(rounds + 1)][1:]
    return {
        "load_s": load_s, **summary(measured, workload), "peak_rss_mb": peak_rss_mb(), "device": session.device,
        "threads": threads, "versions": versions(), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "rounds": rounds,
    }  # fmt: skip


def random_prompts(vocab_size: int, length: int, seed: int, rows: int = 1) -> Callable[[], NDArray[np.int64]]:
    """Gives prompts of random tokens (rows, length) at each call, others each time."""
    rng = np.random.Generator(np.random.PCG64(seed))
    low, high = _TYPICAL_IDS[0] if vocab_size > 2 * _TYPICAL_IDS[0] else 0, min(_TYPICAL_IDS[1], vocab_size)
    return lambda: rng.integers(low, high, (rows, length))


def run_round(session: Session, workload: Workload, seed: int) -> Round:
    """Do a workload once, with prompts that ``seed`` decides."""
    rows = workload.batch
    prompts = random_prompts(session.vocab_size, workload.depth + workload.prompt_tokens, seed, rows)()
    sampler = Sampler(SamplingOptions(), rows=rows, vocab_size=session.vocab_size)
    tokens, chosen = np.empty((rows, 1), dtype=np.int64), []
    ticks = np.empty(workload.new_tokens + 1)
    start, depth = time.perf_counter(), workload.depth
    if session.encoder is not None:  # of sources, what is read before is a part
        depth = 0
        state = session.new_state(capacity=workload.tokens, sources=prompts.tolist())
        prompts = np.array([session.encoder.start] * rows)
    else:
        state = session.new_state(rows, workload.tokens)
    if depth:
        session.step(prompts[:, :depth], state, logits="none")
        start = time.perf_counter()
    tokens[:, 0] = sampler(session.step(prompts[:, depth:], state)[:, 0])
    ticks[0] = time.perf_counter()
    for i in range(1, workload.new_tokens + 1):
        chosen.append(tokens.copy())
        tokens[:, 0] = next_tokens(session, sampler, tokens, state, list(range(rows)))
        ticks[i] = time.perf_counter()
    digest = hashlib.sha256(np.concatenate([*chosen, tokens], axis=1).astype("<i8").tobytes()).hexdigest()
    return Round(float(ticks[0] - start), tuple(np.diff(ticks).tolist()), digest)


def summary(measured: Sequence[Round], workload: Workload) -> dict[str, Any]:
    """Medians over rounds: times, and rates of all rows together."""
    first = statistics.median(m.ttft_s for m in measured)
    decode = statistics.median(m.decode_s for m in measured)
    steps = 1e3 * np.concatenate([m.steps_s for m in measured])
    return {
        "ttft_ms": round(1e3 * first, 2),
        "prefill_tokens_per_s": round(workload.batch * workload.prompt_tokens / first, 1),
        "decode_tokens_per_s": round(workload.batch * workload.new_tokens / decode, 1),
        "itl_ms": {f"p{q}": round(float(np.percentile(steps, q)), 3) for q in (50, 95, 99)},
    }


def versions() -> dict[str, str | None]:
    """What the figures are of."""
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
