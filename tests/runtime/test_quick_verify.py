"""The quick form of verify: one step, and it finds what is far off."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import Numbers
from tiny_bundles import attention_bundle, recurrent_bundle
from tiny_files import copied

from edgellm.cli import run
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify_quickly


@pytest.mark.parametrize("make", [attention_bundle, recurrent_bundle])
def test_a_bundle_holds_after_a_single_step(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(make)
    bundle = Bundle(make())
    session = open_session(bundle, threads=1)
    steps, step = [], session.step
    monkeypatch.setattr(session, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    found = verify_quickly(bundle, session)
    assert found.ok
    assert {"kl", "logits", "state"} <= {check.name for check in found.checks}
    assert len(steps) == 1


def test_spoiled_numbers_are_found_and_the_status_says_so(tmp_path: Path) -> None:
    numbers = Numbers(copied(attention_bundle(), tmp_path))
    gain = numbers.names(lambda n, shape: "norm" in n and len(shape) == 1)[0]
    numbers.put(gain, numbers.get(gain) * 2)
    numbers.write()
    assert run(["verify", str(tmp_path / "bundle"), "--quick"]) == 1
    assert run(["verify", str(attention_bundle()), "--quick"]) == 0
