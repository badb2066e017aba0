"""Which tokens count as PyTorch's most likely ones: ties within a format's own error, and nothing beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import make
from hypothesis import given
from hypothesis import strategies as st

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.checks.distance import favourites, tie_width
from edgellm_runtime.checks.goldens import Golden
from edgellm_runtime.checks.verify import Check, Verification, verify
from edgellm_runtime.loading import unchecked_session

LOGITS = np.array([[3.0, 2.9, 1.0], [5.0, 2.0, 1.0], [0.5, 0.5, 0.2]])
IDS = np.array([[4, 2, 7], [1, 3, 5], [6, 0, 9]])


def golden() -> Golden:
    tokens, none = np.arange(3), np.zeros(0, np.int64)
    return Golden(tokens, IDS, LOGITS, np.full(3, 6.0), none, {})


def chosen(*tokens: int) -> Any:
    """Logits of ten tokens, whose largest is that of one token a place."""
    return np.eye(10, dtype=np.float32)[list(tokens)]


def test_the_golden_s_own_are_the_same_whatever_a_tie_is() -> None:
    assert favourites(golden(), chosen(4, 1, 6), 0.0) == (1.0, 1.0)


def test_a_tie_is_a_logit_of_the_golden_that_is_less_than_the_width_below() -> None:
    found = chosen(2, 3, 0)  # 0.1, 3 and 0 below
    assert favourites(golden(), found, 0.0) == (0.0, 0.0)
    assert favourites(golden(), found, 0.05) == (pytest.approx(1 / 3), 0.0)
    assert favourites(golden(), found, 0.11) == (pytest.approx(2 / 3), 0.0)
    assert favourites(golden(), chosen(8, 8, 8), 100.0) == (0.0, 0.0)  # not among the golden's largest


def test_the_width_is_what_the_export_measured_and_no_more_than_the_bound_allows() -> None:
    assert tie_width({"kl": 0.02}, {"kl": 0.05}) == pytest.approx(0.2)
    assert tie_width({"kl": 9.0}, {"kl": 0.02}) == pytest.approx(0.2)
    assert tie_width({"kl": -1e-12}, {"kl": 1e-6}) == 0
    assert tie_width({}, {"kl": 0.05}) == tie_width({"kl": 0.05}, {}) == 0
    assert tie_width({"kl": 1e-11}, {"kl": 1e-6}) < 1e-5  # float weights: nothing is tied


@given(st.integers(0, 1000), st.floats(0.01, 0.3))
def test_a_kl_divergence_is_that_of_errors_as_wide_as_a_tie(seed: int, error: float) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.standard_normal((200, 50))
    spoilt = logits + error * draw.standard_normal(logits.shape)
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, spoilt))
    kl = float((np.exp(p) * (p - q)).sum(1).mean())
    assert tie_width({"kl": kl}, {"kl": 1.0}) == pytest.approx(error, rel=0.2)


def top1(verification: Verification) -> Check:
    return next(check for check in verification.checks if check.name == "top1")


@pytest.mark.parametrize("family", ["decoder", "mixed"])
def test_an_export_counts_ties_as_verifying_its_bundle_does(family: str, tmp_path: Path) -> None:
    made = export(make(family), tmp_path / "bundle", options=ExportOptions(quantize="int4", bounds={"top1": 0.0}))
    session = unchecked_session(made.bundle, device="cpu", threads=1, kernels="onnxruntime")
    assert top1(made.verification) == top1(verify(made.bundle, session))
    assert "without ties" in top1(made.verification).what
