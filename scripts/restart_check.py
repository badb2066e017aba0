"""A text of thousands of tokens that is gone on with after a restart, from its saved state, beside reading it again.

    python scripts/restart_check.py --bundle runs/smollm2-int4 [--tokens 8000] [--rounds 3]

Each round has a process that loads the bundle, reads the text, answers and writes its state, and then three that load
the bundle and the state and answer. From the loaded bundle to the first token is what is compared; loading the bundle
with its tokenizer, which both do, is told apart. The answers must be the same bits: 16 tokens and their
log-probabilities. Without --bundle, models of 25 million weights that carry recurrences are exported, whose weights are
drawn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime import Model, load

ROOT = Path(__file__).parents[1]
_ANSWER = 16
_RESUMED = 3  # times in a round
SMALL = (("lstm",) * 6, ("gru", "gru", "attention") * 2)


def text(vocab: int, tokens: int) -> list[int]:
    """Random tokens, the same in each process."""
    return np.random.default_rng(0).integers(5, vocab, tokens).tolist()  # type: ignore[no-any-return]


def answered(model: Model, state: Any, more: list[int], began: tuple[float, float]) -> dict[str, Any]:
    """The first token's time since the beginning, and the whole answer."""
    with model.stream(more, max_new_tokens=_ANSWER, ignore_eos=True, logprobs=1, state=state) as stream:
        first = next(stream)
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        chunks = [first, *stream]
    return {
        "seconds": took[0], "processor": took[1], "tokens": [c.token_ids[0] for c in chunks],
        "logprobs": [c.logprobs.logprob.hex() for c in chunks if c.logprobs is not None],
    }  # fmt: skip


def child(part: str, bundle: Path, file: Path, tokens: int, threads: int | None) -> dict[str, Any]:
    """One process's part."""
    begin = time.perf_counter()
    model = load(bundle, threads=threads)
    _ = model.tokenizer  # is read when it is first asked for
    loading = time.perf_counter() - begin
    began = time.perf_counter(), time.process_time()
    if part == "read":
        words = text(model.session.vocab_size, tokens)
        state = model.read(words[:-1])
        found = answered(model, state, words[-1:], began)
        state.save(file)
    else:
        state = model.load_state(file)
        read = time.perf_counter() - began[0]
        last = text(model.session.vocab_size, tokens)[-1:]
        found = {"state_s": read, **answered(model, state, last, began)}
    return {"loading_s": loading, "file_mb": file.stat().st_size / 1e6, **found}


def rounds(bundle: Path, options: argparse.Namespace) -> bool:
    """Both processes, a few times; whether answers are the same."""
    found: dict[str, list[dict[str, Any]]] = {"read": [], "resume": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for part in ("read", *["resume"] * _RESUMED):
                command = [sys.executable, __file__, "--bundle", str(bundle), "--tokens", str(options.tokens), "--part",
                           part, "--file", str(Path(folder, "state")),
                           *(["--threads", str(options.threads)] if options.threads else [])]  # fmt: skip
                found[part].append(
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                )
    same = (
        len(
            {
                json.dumps([each["tokens"], each["logprobs"]], allow_nan=False)
                for part in found.values()
                for each in part
            }
        )
        == 1
    )
    middle = {
        part: {key: float(np.median([e[key] for e in each])) for key in each[0] if key not in ("tokens", "logprobs")}
        for part, each in found.items()
    }
    read, resumed = middle["read"], middle["resume"]
    cells = (
        bundle.name, f"{options.tokens:,}", f"{resumed['file_mb']:.1f}",
        f"{read['seconds']:.2f} ({read['processor']:.2f})",
        f"{1e3 * resumed['seconds']:.1f} ({1e3 * resumed['processor']:.1f}), its file {1e3 * resumed['state_s']:.1f}",
        f"{read['seconds'] / resumed['seconds']:.0f} ({read['processor'] / resumed['processor']:.0f})",
        f"{1e3 * resumed['loading_s']:.0f}", "same bits" if same else "NOT THE SAME",
    )  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    return same


def small(pattern: tuple[str, ...], folder: Path, context: int) -> Path:
    """A bundle of a model with recurrences."""
    import torch

    from edgellm.models.hybrid import Hybrid, HybridConfig
    from edgellm_exporters.export import ExportOptions, export

    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=4096, width=512, pattern=pattern, num_heads=8, num_kv_heads=2, recurrent_width=512, mlp_width=1408,
        max_context=context,
    )  # fmt: skip
    path = folder / "-".join(pattern)
    export(Hybrid(config).eval(), path, options=ExportOptions(target="cpu"))
    return path


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--part", choices=("read", "resume"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(
            json.dumps(
                child(options.part, options.bundle[0], options.file, options.tokens, options.threads), allow_nan=False
            )
        )
        return 0
    print("| bundle | tokens | state, MB | reading, s (processor) | from its state, ms (processor) | times | "
          "loading the bundle, ms | answers |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made = options.bundle or [small(pattern, Path(folder), options.tokens + 192) for pattern in SMALL]
        same = [rounds(bundle, options) for bundle in made]  # each is told, whatever the others are
        return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
