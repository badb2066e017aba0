"""The short form of ``make serve-soak``: many clients, of whom some leave and some send nonsense; nothing is mixed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from served import serving
from tiny_bundles import attention_bundle

from edgellm_runtime.batching.options import BatchOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from serve_soak import soak


@pytest.mark.slow
def test_nothing_is_lost_or_mixed_among_many_clients(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"tiny": attention_bundle()}, batch=BatchOptions(rows=3, queue=4)) as served:
        # how much memory a test process takes is not this test's to say
        assert soak(served, requests=80, clients=8, growth_allowed=10) == []
        counts = served.model.scheduler.load.counts
    assert counts["requests"] > 10
    assert counts.get("failed", 0) == 0
    assert "requests in" in capsys.readouterr().out
