"""Speculation on a real bundle: whether its tokens are the plain ones, how many steps it takes, why some differ.

    python scripts/speculation.py BUNDLE [--draft SMALLER|lookup|recurrent|combined ...] [--tokens 300] [--text FILE]

Texts are of this repository: three that are to be copied, and five that are gone on with. With --text they are pieces
of the end of a file, unseen by a drafter that was trained on it. Each text is answered plainly and with each draft, in
turn, by one session. Where tokens differ, the two logits are shown as a third reading has them, of the whole text
at once: near ones are a tie within rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edgellm_runtime import Generation, Model, load
from edgellm_runtime.generation.drafting import Drafting

ROOT = Path(__file__).parents[1]


def prompts() -> dict[str, list[str]]:
    """Texts by what is asked for."""
    page, licence = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/embedding.md", "LICENSE"))
    parts = (page[3000:4500], licence[1000:2500], page[9000:10500])
    copied = [f"Copy this text exactly:\n\n{part}\n\nCopy:\n\n{part[:200]}" for part in parts]
    free = [page[at : at + 400] for at in (6000, 12000, 18000)]
    return {"copied": copied, "gone on with": [*free, "Once upon a time", "The capital of France"]}


def held_out(file: Path, count: int, share: float = 0.05) -> dict[str, list[str]]:
    """Pieces of 300 characters, evenly spread over the end of a text."""
    text = file.read_text(encoding="utf-8")
    text = text[int(len(text) * (1 - share)) :]
    return {
        "held out": [text[at : at + 300] for at in range(0, len(text) - 300, max(1, (len(text) - 300) // count))][
            :count
        ]
    }


def difference(model: Model, text: list[int], plain: tuple[int, ...], drafted: tuple[int, ...]) -> str:
    """Where two answers part, and by how much another reading of the text tells their tokens apart."""
    at = next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b)
    whole = np.array([[*text, *plain[:at]]])
    logits = model.session.step(whole, model.session.new_state())[0, 0]
    return f"parts at token {at}: logits {logits[plain[at]]:.3f} and {logits[drafted[at]]:.3f}"


class Sums:
    """What came of one draft over the texts of a kind."""

    def __init__(self) -> None:
        self.counts, self.seconds = np.zeros(5, int), np.zeros(2)

    def add(self, model: Model, text: list[int], plain: Generation, found: Generation) -> str:
        """Count an answer, and say what came of it."""
        seen, same = found.speculation, plain.tokens == found.tokens
        assert seen is not None
        self.counts += (len(found.tokens), seen.steps, seen.drafted, seen.accepted, same)
        self.seconds += (plain.timings.decode_s, found.timings.decode_s)
        ratio = plain.timings.decode_s / found.timings.decode_s
        said = "" if same else difference(model, text, plain.tokens, found.tokens)
        return f"{seen.steps} steps, accepted {seen.acceptance:.0%}, {ratio:.2f} times as fast {said}"

    def total(self, texts: int) -> str:
        """All of it in a line."""
        count, steps, drafted, accepted, same = self.counts.tolist()
        return (
            f"{count} tokens in {steps} steps, {accepted} of {drafted} drafted tokens right, {same} of {texts} answers "
            f"are the plain ones; {count / max(steps + texts, 1):.2f} tokens a step, "
            f"{self.seconds[0] / self.seconds[1]:.2f} times as fast"
        )


def main() -> None:
    """Print a line for each text and draft, and one for each kind and draft."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--draft", nargs="+", default=["lookup"], help="other bundles, lookup, recurrent, combined")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--text", type=Path, help="a file whose end is gone on with")
    parser.add_argument("--texts", type=int, default=12, help="pieces of it")
    options = parser.parse_args()
    model = load(options.bundle)
    assert model.tokenizer is not None
    drafts: dict[str, Drafting] = {x: x if x in ("lookup", "recurrent", "combined") else load(x) for x in options.draft}
    model.generate("A first answer, before any is timed.", max_new_tokens=16, ignore_eos=True)
    for kind, texts in (prompts() if options.text is None else held_out(options.text, options.texts)).items():
        sums = {name: Sums() for name in drafts}
        for text in texts:
            tokens = model.tokenizer.encode(text)
            plain = model.generate(tokens, max_new_tokens=options.tokens, ignore_eos=True)
            for name, draft in drafts.items():
                found = model.generate(tokens, max_new_tokens=options.tokens, ignore_eos=True, draft=draft)
                print(f"{kind}, {name}: {sums[name].add(model, tokens, plain, found)}", flush=True)
        for name, total in sums.items():
            print(f"{kind}, {name}, in all: {total.total(len(texts))}")


if __name__ == "__main__":
    main()
