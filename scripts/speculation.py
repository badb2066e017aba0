"""Speculation on a real bundle: whether its tokens are the plain ones, how many steps it takes, why some differ.

    python scripts/speculation.py BUNDLE [--draft SMALLER|lookup|recurrent|combined] [--tokens 300] [--text FILE]

Texts are of this repository: three that are to be copied, and five that are gone on with. With --text they are pieces
of the end of a file, unseen by a drafter that was trained on it. Where tokens differ, the logits of the two are shown
as a third reading has them, of the whole text at once: near ones are a tie within rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edgellm_runtime import Model, load

ROOT = Path(__file__).parents[1]


def prompts() -> dict[str, list[str]]:
    """Texts by what is asked for."""
    page, licence = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/embedding.md", "LICENSE"))
    parts = (page[3000:4500], licence[1000:2500], page[9000:10500])
    copied = [f"Copy this text exactly:\n\n{part}\n\nCopy:\n\n{part[:200]}" for part in parts]
    free = [page[at : at + 400] for at in (6000, 12000, 18000)]
    return {"copied": copied, "gone on with": [*free, "Once upon a time", "The capital of France"]}


def held_out(file: Path, count: int = 12, share: float = 0.05) -> dict[str, list[str]]:
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


def main() -> None:
    """Print a line for each text, and one for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--draft", default="lookup", help="another bundle, lookup, recurrent or combined")
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--text", type=Path, help="a file whose end is gone on with")
    options = parser.parse_args()
    model = load(options.bundle)
    assert model.tokenizer is not None
    draft = options.draft if options.draft in ("lookup", "recurrent", "combined") else load(options.draft)
    for kind, texts in (prompts() if options.text is None else held_out(options.text)).items():
        total, seconds = np.zeros(5), np.zeros(2)
        for text in texts:
            tokens = model.tokenizer.encode(text)
            plain = model.generate(tokens, max_new_tokens=options.tokens, ignore_eos=True)
            found = model.generate(tokens, max_new_tokens=options.tokens, ignore_eos=True, draft=draft)
            seen = found.speculation
            assert seen is not None
            total += (len(found.tokens), seen.steps, seen.drafted, seen.accepted, plain.tokens == found.tokens)
            seconds += (plain.timings.decode_s, found.timings.decode_s)
            ratio = plain.timings.decode_s / found.timings.decode_s
            said = "" if plain.tokens == found.tokens else difference(model, tokens, plain.tokens, found.tokens)
            print(
                f"{kind}: {seen.steps} steps, accepted {seen.acceptance:.0%}, {ratio:.2f} times as fast {said}",
                flush=True,
            )
        count, steps, drafted, accepted, same = total.astype(int).tolist()
        print(
            f"{kind}: {count} tokens in {steps} steps, {accepted} of {drafted} drafted tokens right, "
            f"{same} of {len(texts)} answers are the plain ones; {count / max(steps + len(texts), 1):.2f} tokens a "
            f"step, {seconds[0] / seconds[1]:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
