"""A few hundred spoiled bundles and saved states: each works or is refused in a sentence; none crashes, hangs or grows.

``make fuzz`` runs as many as it is given time for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fuzzing import make_source, run_cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")


def test_spoiled_bundles_work_or_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    failures = list(run_cases(make_source(tmp_path / "source"), tmp_path, 0, 120))
    assert not failures, "\n".join(f"case {f.number}: {f.what}" for f in failures)
