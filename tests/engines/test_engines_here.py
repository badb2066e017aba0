"""Whether an engine may run here, which graph runs a step, and what a manifest may say of both: no library, no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_manifests import engine, manifest

from edgellm_runtime.backends.engine_fit import check_engine
from edgellm_runtime.backends.graph_roles import GraphRoles
from edgellm_runtime.bundle import Manifest
from edgellm_runtime.bundle.engine_info import EngineInfo
from edgellm_runtime.errors import BackendError, BundleError

HERE = {"library": "tensorrt_rtx", "version": "1.7.1", "compute_capability": "8.9"}


def check(role: str, *engines: EngineInfo, **here: str) -> EngineInfo:
    bundle: Any = SimpleNamespace(path=Path("some/bundle"), manifest=manifest(*engines))
    return check_engine(bundle, role, **{**HERE, **here})


def test_the_engine_for_this_library_version_and_gpu_is_found_among_several() -> None:
    other = engine("decode", library="tensorrt", library_version="11.0", file="other.engine")
    older = engine("decode", library_version="1.6.0", file="older.engine")
    assert check("decode", engine("prefill"), other, older, engine("decode")).file == "decode.engine"


@pytest.mark.parametrize(
    ("changes", "here", "says"),
    [
        ({"library_version": "1.6.0"}, {}, r"decode\.engine was built by tensorrt_rtx 1\.6\.0, here is 1\.7\.1"),
        ({}, {"compute_capability": "12.0"}, r"for compute capability 8\.6, 8\.9, the GPU here has 12\.0"),
        ({"graph_sha256": "another"}, {}, "was built from another graph than the one beside it"),
        ({"precision": "bfloat16"}, {}, "computes in bfloat16, the bundle in float16"),
        ({"library": "tensorrt"}, {}, "engine of role decode for tensorrt_rtx, but holds only one for tensorrt"),
        ({"role": "prefill"}, {}, "needs an engine of role decode for tensorrt_rtx, but holds none"),
    ],
)
def test_an_engine_that_is_stale_or_foreign_is_refused_with_the_command_that_builds_it(
    changes: dict[str, Any], here: dict[str, str], says: str
) -> None:
    with pytest.raises(BundleError, match=rf"some/bundle: .*{says}; build it here: edgellm build some/bundle"):
        check("decode", engine(**{"role": "decode", **changes}), **here)


def test_a_bundle_for_another_target_says_so() -> None:
    bundle: Any = SimpleNamespace(
        path=Path("b"), manifest=manifest(graphs={}, capacity=None, target={"name": "cpu", "requires": {}})
    )
    with pytest.raises(BundleError, match=r"b: is for target cpu, which has no engines; .* --target tensorrt"):
        check_engine(bundle, "decode", **HERE)


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_graphs_and_engines_survive_the_manifest() -> None:
    before = manifest(engine("prefill"), engine("decode"))
    assert Manifest.from_json(before.to_json(), Path("m")) == before


def test_a_manifest_without_them_says_nothing_of_them() -> None:
    written = manifest(graphs={}, capacity=None).to_json()
    assert not written.keys() & {"graphs", "capacity", "engines"}
    assert Manifest.from_json(written, Path("m")).graph_files == ("model.onnx",)


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("graphs", to=[]),
        _set("graphs", "decode", "time", to=2),
        _set("graphs", "decode", "time", to=True),
        _set("graphs", "prefill", "file", to="../prefill.onnx"),
        _set("graphs", "prefill", "file", to="absent.onnx"),
        _set("graphs", "draft", to={"file": "decode.onnx", "time": 1}),
        _set("graphs", to={"decode": {"file": "decode.onnx", "time": 1}}),
        _set("capacity", to=None),
        _set("capacity", to=55),  # a full row and a padded chunk do not fit
        _set("engines", to={}),
        _set("engines", 0, "file", to="absent.engine"),
        _set("engines", 0, "role", to="draft"),
        _set("engines", 0, "library", to="os"),
        _set("engines", 0, "library_version", to=1),
        _set("engines", 0, "compute_capabilities", to=[]),
        _set("engines", 0, "compute_capabilities", to=["8.9; rm"]),
        _set("engines", 0, "compute_capabilities", to="8.9"),
        _set("engines", 0, "profile", "tokens", "max", to=[0, 1]),
        _set("engines", 0, "profile", "tokens", "max", to=[4]),
        _set("engines", 0, "profile", "tokens", "min", to=[2, 1]),
        _set("engines", 0, "profile", to=3),
        _set("graphs", to={}),  # engines of no graphs
    ],
)
def test_a_manifest_with_graphs_or_engines_that_cannot_be_is_refused(change: Callable[[Any], None]) -> None:
    data = copy.deepcopy(manifest(engine("prefill"), engine("decode")).to_json())
    change(data)
    with pytest.raises(BundleError, match="damaged"):
        Manifest.from_json(data, Path("m"))


# --- roles ----------------------------------------------------------------------------------------------------------


def test_single_tokens_go_to_decode_and_others_are_padded_for_prefill() -> None:
    roles = GraphRoles.of(manifest())
    assert [roles.choose(time).name for time in (1, 2, 15, 16)] == ["decode", "prefill", "prefill", "prefill"]
    tokens = np.arange(6).reshape(2, 3) + 1
    padded = roles.choose(3).pad(tokens)
    assert padded.shape == (2, 16) and padded.dtype == np.int64
    assert (padded[:, :3] == tokens).all() and not padded[:, 3:].any()
    whole = np.ones((2, 16), np.int64)
    assert roles.choose(16).pad(whole) is whole
    assert roles.longest == 16


def test_a_step_that_is_too_long_for_every_graph_is_refused() -> None:
    with pytest.raises(BackendError, match="a step of 17 tokens, but the longest graph takes 16"):
        GraphRoles.of(manifest()).choose(17)
