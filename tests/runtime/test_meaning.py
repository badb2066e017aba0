"""What a bundle's tokens, texts and limits mean is proved too: none of these changes passes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from meanings import MEANINGS
from tiny_bundles import attention_bundle, recurrent_bundle, window_bundle
from tiny_files import copied, edit_manifest, sign

from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.meaning import differences, meaning_of
from edgellm_runtime.checks.verify import Check, verify
from edgellm_runtime.errors import BundleError


def checked(path: Path) -> dict[str, Check]:
    bundle = Bundle(path)
    return {check.name: check for check in verify(bundle, open_session(bundle, threads=1)).checks}


@pytest.mark.parametrize("name", MEANINGS)
def test_a_change_of_meaning_is_refused_or_found(name: str, tmp_path: Path) -> None:
    path = copied(attention_bundle(), tmp_path)
    MEANINGS[name](path)
    with contextlib.suppress(BundleError):
        assert not all(check.ok for check in checked(path).values())


@pytest.mark.parametrize("make", [attention_bundle, recurrent_bundle, window_bundle])
def test_nothing_has_changed_in_a_bundle_as_it_was_exported(make: object) -> None:
    assert callable(make)
    found = checked(make())["meaning"]
    assert found.ok
    assert found.value == 0


def test_what_differs_is_named(tmp_path: Path) -> None:
    path = copied(attention_bundle(), tmp_path)
    edit_manifest(path, max_context=64)
    assert "max_context" in checked(path)["meaning"].what


def test_a_record_that_is_not_there_does_not_hold(tmp_path: Path) -> None:
    path = copied(attention_bundle(), tmp_path)
    goldens = json.loads((path / "goldens.json").read_text())
    del goldens["meaning"]
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    assert not checked(path)["meaning"].ok


def test_a_bundle_from_before_is_not_asked_for_it(tmp_path: Path) -> None:
    path = copied(attention_bundle(), tmp_path)
    bounds = {name: b for name, b in Bundle(path).manifest.bounds.items() if name != "meaning"}
    edit_manifest(path, bounds=bounds)
    goldens = json.loads((path / "goldens.json").read_text())
    del goldens["meaning"]
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    found = checked(path)
    assert "meaning" not in found
    assert all(check.ok for check in found.values())


def test_the_record_says_what_a_template_writes_and_is_plain_json() -> None:
    bundle = Bundle(attention_bundle())
    found = meaning_of(bundle)
    assert found["template: question"]["ids"]
    assert found["text 1"]["decoded"]
    assert differences(json.loads(json.dumps(found)), bundle) == []
