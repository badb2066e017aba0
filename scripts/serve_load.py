"""Tokens a second of a server with one client and with several at once, and how long those wait.

    python scripts/serve_load.py --bundle runs/smollm2-int8 --clients 1 8

Each number of clients takes its turn in each round, so that a machine that changes its speed changes it for all; the
best round of each counts for tokens a second, all rounds for waiting. Every request reads a prompt of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx2 as httpx
import numpy as np
from served import Served, serving

from edgellm_runtime.batching.options import BatchOptions


@dataclass
class Figures:
    """Of one number of clients.

    Args:
        rates: tokens a second, of each round.
        first: seconds to the first token, of each request.
        between: seconds between two tokens.
    """

    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def ask(served: Served, prompt: list[int], tokens: int, figures: Figures) -> None:
    """One request, with a token as soon as it is there."""
    body = {"model": served.model.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "logprobs": 0}  # fmt: skip
    times = [time.perf_counter()]
    with httpx.stream("POST", f"{served.address}/v1/completions", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["logprobs"]:
                times.append(time.perf_counter())
    if len(times) != tokens + 1:
        raise RuntimeError(f"{len(times) - 1} tokens came, not {tokens}")
    figures.first.append(times[1] - times[0])
    figures.between.extend(np.diff(times[1:]).tolist())


def measure(served: Served, clients: int, *, prompt: int, tokens: int, seed: int, figures: Figures) -> None:
    """One round."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(5, served.model.model.session.vocab_size, (clients, prompt)).tolist()
    threads = [threading.Thread(target=ask, args=(served, p, tokens, figures)) for p in prompts]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures.rates.append(clients * tokens / (time.perf_counter() - begin))


def told(found: dict[int, Figures]) -> None:
    """Print a table."""
    base = max(found[min(found)].rates)
    print("| clients | tokens/s | against one | first token p50 / p95 / p99, ms | between tokens p50 / p95 / p99, ms |")
    print("|---|---|---|---|---|")
    for clients, figures in found.items():
        waits = [" / ".join(f"{1e3 * q:.0f}" for q in np.percentile(s, [50, 95, 99])) for s in
                 (figures.first, figures.between)]  # fmt: skip
        best = max(figures.rates)
        print(f"| {clients} | {best:.1f} | {best / base:.2f} | {waits[0]} | {waits[1]} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bundle and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    found = {clients: Figures() for clients in options.clients}
    batch = BatchOptions(rows=max(options.clients), queue=max(options.clients))
    with serving({options.bundle.name: options.bundle}, batch=batch, threads=options.threads) as served:
        measure(served, 1, prompt=8, tokens=4, seed=0, figures=Figures())
        for number in range(options.rounds):
            for clients, figures in found.items():
                seed = 1000 * number + clients
                measure(served, clients, prompt=options.prompt, tokens=options.tokens, seed=seed, figures=figures)
    told(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
