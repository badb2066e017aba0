"""What looking drafts up gains where a text is copied, and what it costs where nothing matches.

    EDGELLM_KERNELS=own python scripts/lookup_check.py BUNDLE [--rounds 5] [--tokens 200]

Texts are of this repository. Copies are greedy. Nothing matches where no two tokens may come again as they came before
(``no_repeat_ngram=2``), with and without drafts alike, and next to nothing where tokens are drawn at temperature 2.
Each text is answered with and without drafts in turn, which of them comes first changing from round to round; the
ratio is of the medians of a text's times for its tokens after the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime import load

ROOT = Path(__file__).parents[1]


def prompts() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Texts by kind, with the options of their answers."""
    page, licence = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/embedding.md", "LICENSE"))
    parts = (page[3000:4500], licence[1000:2500], page[9000:10500])
    copied = [f"Copy this text exactly:\n\n{part}\n\nCopy:\n\n{part[:200]}" for part in parts]
    free = [page[at : at + 400] for at in (6000, 12000, 18000)]
    return {
        "copied": (copied, {}),
        "nothing matches": (free, {"no_repeat_ngram": 2}),
        "drawn at temperature 2": (free, {"temperature": 2.0, "seed": 1}),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    options = parser.parse_args()
    model = load(options.bundle)
    assert model.tokenizer is not None
    model.generate("A first answer, before any is timed.", max_new_tokens=16, ignore_eos=True)
    print("| texts | drafted | right | tokens a second without | with | times | of each text | the same tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, (texts, how) in prompts().items():
        times, same, drafted, right = np.zeros((2, len(texts), options.rounds)), 0, 0, 0
        for at, text in enumerate(texts):
            tokens, found = model.tokenizer.encode(text), {}
            for number in range(options.rounds):
                for with_drafts in ((0, 1), (1, 0))[number % 2]:
                    draft: Any = {"draft": "lookup"} if with_drafts else {}
                    found[with_drafts] = model.generate(
                        tokens, max_new_tokens=options.tokens, ignore_eos=True, **how, **draft
                    )
                    times[with_drafts, at, number] = found[with_drafts].timings.decode_s
            same += found[0].tokens == found[1].tokens
            drafted, right = drafted + found[1].speculation.drafted, right + found[1].speculation.accepted
        without, with_ = np.median(times, axis=2)
        rate = len(texts) * (options.tokens - 1) / without.sum(), len(texts) * (options.tokens - 1) / with_.sum()
        each = ", ".join(f"{ratio:.3f}" for ratio in without / with_)
        print(f"| {kind} | {drafted} | {right} | {rate[0]:.0f} | {rate[1]:.0f} | {without.sum() / with_.sum():.3f} | "
              f"{each} | {same} of {len(texts)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
