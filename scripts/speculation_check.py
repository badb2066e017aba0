"""Greedy tokens with drafts beside those without, over 10,000 tokens of each of many models, of all kinds of state.

    python scripts/speculation_check.py [--tokens 10000] [--bundle BUNDLE --bundle BUNDLE=DRAFT ...] [--only KIND]

Of each kind of layer a small model is exported, with weights that are drawn; drafts are looked up in the text, and made
by the same model with its weights disturbed, which is right now and then. They are asked for whether or not they pay.
Where answers part, the tokens up to there count, and the two tokens' logits are compared in two readings more, of the
whole text at once and token by token: a tie is a gap within what those two differ by. Ends with 1 if one is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from families import make

from edgellm.models.mamba2 import mamba2
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import Model, load
from edgellm_runtime.generation.drafting import BundleDrafter, Draft, PromptLookup

KINDS = ("attention", "local", "lstm", "gru", "short convolutions and attention", "state space", "mixed")
_CONTEXT = 512
_LONGEST = 6  # tokens of a draft


class Insisting:
    """A source of drafts that asks for them of one length, whether or not they pay.

    Args:
        make: a drafter for each text.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def drafter(self) -> Insisting:
        """One for a text."""
        made = Insisting(self._make)
        made._own = self._make()  # type: ignore[attr-defined]
        return made

    def observe(self, tokens: Sequence[int], /) -> None:
        """Tell it what the text has."""
        self._own.observe(tokens)  # type: ignore[attr-defined]

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """Its draft."""
        return self._own.propose(lambda kind: _LONGEST)  # type: ignore[attr-defined, no-any-return]


@dataclass
class Found:
    """What a model's answers came to.

    Args:
        tokens: that were compared, those where answers parted among them.
        drafted: tokens that were proposed.
        accepted: of those, the ones that were right.
        gaps: where answers parted, by how much the plain token's logit is above the other, and by how much two
            readings of one text differ there.
    """

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ties(self) -> bool:
        """Whether every difference is one within rounding."""
        return all(abs(gap) <= rounding for gap, rounding in self.gaps)


def small(kind: str, folder: Path) -> tuple[Model, Model]:
    """A model of a kind, and a disturbed one that drafts for it."""
    made = make(kind)
    built = mamba2 if kind == "state space" else type(made)
    longer = built(dataclasses.replace(made.config, max_context=_CONTEXT)).eval()
    longer.load_state_dict(made.state_dict())
    export(longer, folder / "model", options=ExportOptions(target="cpu"))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in longer.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0.0)
    export(longer, folder / "draft", options=ExportOptions(target="cpu"))
    return load(folder / "model", threads=1), load(folder / "draft", threads=1)


def prompts(vocab: int, seed: int = 0) -> Iterator[list[int]]:
    """Random tokens, of which the second half are often those of the first."""
    rng = np.random.default_rng(seed)
    while True:
        half = rng.integers(5, vocab, rng.integers(4, 24)).tolist()
        yield half + (half[: rng.integers(1, len(half) + 1)] if rng.random() < 0.5 else [])


def parted(
    model: Model, text: Sequence[int], at: int, plain: Sequence[int], drafted: Sequence[int]
) -> tuple[float, float]:
    """The gap between two tokens' logits as the whole text at once has them, and how far two readings are apart."""
    session, before = model.session, [*text, *plain[:at]]
    whole = session.step(np.array([before]), session.new_state())[0, 0].copy()
    state = session.new_state()
    for token in before:
        single = session.step(np.array([[token]]), state)[0, 0]
    both = [plain[at], drafted[at]]
    gaps = [float(x[both[0]] - x[both[1]]) for x in (whole, single)]
    return min(gaps, key=abs), 2 * float(np.abs(whole - single).max())


def check(model: Model, source: Any, tokens: int, longest: int) -> Found:
    """Answer until so many tokens have been compared."""
    found = Found()
    for prompt in prompts(model.session.vocab_size):
        if found.tokens >= tokens:
            break
        options = {"max_new_tokens": min(longest, model.session.max_context - len(prompt)), "ignore_eos": True}
        plain = model.generate(prompt, **options)
        drafted = model.generate(prompt, **options, draft=source)
        assert drafted.speculation is not None
        found.drafted += drafted.speculation.drafted
        found.accepted += drafted.speculation.accepted
        pairs = zip(plain.tokens, drafted.tokens, strict=True)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        found.tokens += len(plain.tokens) if at is None else at + 1
        if at is not None:
            found.gaps.append(parted(model, prompt, at, plain.tokens, drafted.tokens))
    return found


def line(name: str, kind: str, found: Found) -> str:
    """A row of the table."""
    gaps = [f"{abs(gap):.2g} of {rounding:.2g}" for gap, rounding in sorted(found.gaps, key=lambda g: -abs(g[0]))]
    worst = f"; widest gaps: {', '.join(gaps[:2])}" if gaps else ""
    share = found.accepted / max(found.drafted, 1)
    return (f"| {name} | {kind} | {found.tokens:,} | {found.drafted:,} | {share:.0%} | {len(found.gaps)}{worst} |"
            f"{'' if found.ties else ' NOT A TIE'}")  # fmt: skip


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--bundle", action="append", default=[], help="BUNDLE, or BUNDLE=DRAFT; beside the small ones")
    parser.add_argument("--only", action="append", choices=[*KINDS, "none"], help="of the small ones")
    options = parser.parse_args()
    print("| model | drafts | tokens compared | drafted | right | answers that part |")
    print("|---|---|---|---|---|---|", flush=True)
    good = True

    def told(name: str, model: Model, draft: Model | None, longest: int) -> None:
        nonlocal good
        sources = {"looked up": Insisting(PromptLookup)}
        if draft is not None:
            sources["a model"] = Insisting(lambda: BundleDrafter(draft.session))
        for kind, source in sources.items():
            found = check(model, source, options.tokens, longest)
            good &= found.ties
            print(line(name, kind, found), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for kind in [kind for kind in KINDS if kind in (options.only or KINDS)]:
            told(kind, *small(kind, Path(folder, kind)), longest=_CONTEXT)
    for text in options.bundle:
        path, _, draft = text.partition("=")
        told(Path(path).name, load(path, threads=1), load(draft, threads=1) if draft else None, longest=250)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
