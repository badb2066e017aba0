"""What a state says of itself: kept word for word when it is sound, refused by name when it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bundle_format import manifest as manifest_of
from test_bundle_format import table
from tiny_bundles import recurrent_bundle

from edgellm_runtime import BundleError, StateSpec
from edgellm_runtime.bundle import Manifest
from edgellm_runtime.spec import UPDATES, SpecError

RING = {"name": "k", "shape": ["batch", 2, 8, 4], "dtype": "float32", "update": "ring", "axis": 2, "window": 5}
STATIC = {"name": "m", "shape": ["batch", 3], "dtype": "float32", "update": "static"}


@pytest.mark.parametrize("data", [RING, STATIC, RING | {"window": 8}, RING | {"axis": 1, "window": 1}])
def test_a_state_of_fixed_size_is_read_and_written_word_for_word(data: dict[str, Any]) -> None:
    assert StateSpec.from_json(data).to_json() == data


def test_every_update_is_documented_and_only_a_ring_has_an_axis_and_a_window() -> None:
    assert set(UPDATES) == table("| update | shape | rule |").keys()
    assert not {"axis", "window"} & STATIC.keys()
    assert StateSpec.from_json(STATIC).to_json() == STATIC


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"update": "rign"}, "k: update 'rign' is none of append, ring, replace, static"),
    ({"update": ["ring"]}, "update \\['ring'\\] is none of"),
    ({"update": None}, "update None is none of"),
    ({"update": "static"}, "k: only a ring has an axis and a window, not a state of 'static'"),
    ({"update": "append", "shape": ["batch", "capacity"]}, "only a ring has an axis"),
    ({"axis": None}, "k: axis None is none of a ring of shape"),
    ({"axis": 0}, "axis 0 is none"),
    ({"axis": 4}, "axis 4 is none"),
    ({"axis": -1}, "axis -1 is none"),
    ({"axis": True}, "axis True is none"),
    ({"axis": "2"}, "axis '2' is none"),
    ({"axis": 2.0}, "axis 2.0 is none"),
    ({"window": 0}, "k: window 0 is not from 1 to the ring's 8 slots"),
    ({"window": 9}, "window 9 is not from 1 to the ring's 8 slots"),
    ({"window": -3}, "window -3 is not"),
    ({"window": None}, "window None is not"),
    ({"window": True}, "window True is not"),
    ({"window": 1.5}, "window 1.5 is not"),
    ({"window": 10**400}, "k: window 1000"),
    ({"shape": ["batch", 2, "capacity", 4]}, "k: ring state of shape .* must have symbols \\[\\]"),
    ({"shape": ["batch", 2, "slots", 4]}, "must have symbols \\[\\]"),
    ({"shape": [2, 2, 8, 4]}, "must begin with 'batch'"),
    ({"shape": ["batch"], "axis": 1}, "axis 1 is none"),
    ({"shape": ["batch", 2, 0, 4]}, "dimension 0 is neither a positive int nor a symbol"),
    ({"shape": ["batch", 2, 2**31, 4]}, "is neither a positive int"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_an_impossible_state_in_a_manifest_is_a_bundle_error(change: Mapping[str, Any], said: str) -> None:
    data = manifest_of(recurrent_bundle())
    data["signature"]["state"][0] = {**RING, **change}
    with pytest.raises(BundleError, match=f"^here: damaged \\(.*{said}.*; export the model again$"):
        Manifest.from_json(data, Path("here"))


@pytest.mark.parametrize("key", ["name", "shape", "dtype", "update"])
def test_a_state_without_a_key_is_a_bundle_error(key: str) -> None:
    data = manifest_of(recurrent_bundle())
    data["signature"]["state"][0] = {name: value for name, value in RING.items() if name != key}
    with pytest.raises(BundleError, match="damaged"):
        Manifest.from_json(data, Path("here"))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.just(2**40), st.floats(),
    st.sampled_from([*UPDATES, "batch", "capacity"]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.just("k"), SCALARS, max_size=1))


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(list(RING)), VALUES, max_size=3), base=st.sampled_from([RING, STATIC]))
def test_any_state_is_refused_or_comes_back_as_it_was(changes: dict[str, Any], base: dict[str, Any]) -> None:
    with suppress(SpecError, TypeError, KeyError):  # which a manifest's reader makes a BundleError
        spec = StateSpec.from_json(base | changes)
        assert StateSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
        for written in range(20):
            assert 0 <= spec.earliest(written) <= written
            assert all(part.stop is None or part.stop <= max(written, 1) for part in spec.used(written))
