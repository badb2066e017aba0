"""The script that compares answers with and without drafts: what differs is seen, and a tie told from a fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import attention_bundle, recurrent_bundle

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from speculation_check import Found, Insisting, check, line

from edgellm_runtime import load
from edgellm_runtime.generation.drafting import BundleDrafter, PromptLookup


@pytest.mark.parametrize("bundle", [attention_bundle, recurrent_bundle])
def test_answers_are_the_plain_ones_with_drafts_that_are_always_asked_for(bundle: Any) -> None:
    model = load(bundle(), threads=1)
    for source in (PromptLookup, lambda: BundleDrafter(model.session)):
        found = check(model, Insisting(source), 200, 60)
        assert found.tokens >= 200 and found.drafted > 50 and not found.gaps and found.ties


def test_a_token_that_a_draft_has_changed_is_no_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(attention_bundle(), threads=1)
    step, others = model.session.step, [0]

    def wrong(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        logits = step(tokens, *args, **kwargs)
        if kwargs.get("logits") == "all":  # as drafts are checked
            others[0] += 1
            logits = np.roll(logits, 1, axis=-1)
        return logits

    monkeypatch.setattr(model.session, "step", wrong)
    found = check(model, Insisting(PromptLookup), 300, 60)
    assert others[0] and found.gaps and not found.ties
    assert "NOT A TIE" in line("x", "looked up", found)


def test_a_gap_within_what_two_readings_differ_by_is_a_tie_and_is_told() -> None:
    found = Found(tokens=9, gaps=[(1e-6, 2e-6), (-3e-6, 4e-6)])
    assert found.ties and "| 2; widest gaps: 3e-06 of 4e-06, 1e-06 of 2e-06 |" in line("x", "looked up", found)
    assert not Found(tokens=9, gaps=[(2e-6, 1e-6)]).ties
