"""Which kernels take the time, as ``edgellm bench --profile`` tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_bundles import attention_bundle, copied, edit_manifest, recurrent_bundle

from edgellm.cli import run
from edgellm_runtime.checks import bench
from edgellm_runtime.checks.profile import _runs, _summary, profile
from edgellm_runtime.errors import BackendError, ContextError, OptionError


@pytest.mark.parametrize("bundle", [attention_bundle, recurrent_bundle])
def test_every_kernel_of_a_prompt_and_of_a_token_is_told(bundle) -> None:
    found = profile(bundle(), prompt_tokens=5, new_tokens=3)
    assert found.keys() == {"prompt", "token"}
    for kernels in found.values():
        assert sum(k.share for k in kernels) == pytest.approx(1, abs=0.01)
        assert [k.ms for k in kernels] == sorted((k.ms for k in kernels), reverse=True)
        assert all(k.count >= 1 for k in kernels)
    # one graph serves both, so both run the same kernels equally often
    assert {k.kernel: k.count for k in found["prompt"]} == {k.kernel: k.count for k in found["token"]}


def test_kernels_are_counted_to_the_run_that_they_are_in() -> None:
    def kernel(name: str, ts: int, dur: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": name}}

    events = [
        {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 90},
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 50},
        kernel("MatMul", 110, 30), kernel("Add", 145, 5), kernel("MatMul", 210, 10),
        kernel("Cast", 50, 5),  # of a weight, before any run
        {"cat": "Node", "name": "MatMul_fence_before", "ts": 210, "dur": 1, "args": {"op_name": "MatMul"}},
    ]  # fmt: skip
    runs = _runs(events)
    assert runs == [[("MatMul", 30.0), ("Add", 5.0)], [("MatMul", 10.0)]]
    mean = _summary(runs, 2)
    assert [(k.kernel, k.count, k.ms) for k in mean] == [("MatMul", 1, 0.02), ("Add", 0, 0.003)]
    assert mean[0].share == pytest.approx(40 / 45, abs=1e-4)


def test_the_command_prints_both_tables_and_json_holds_them(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(attention_bundle()), "--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "1"]
    assert run([*arguments, "--profile"]) == 0
    shown = capsys.readouterr().out
    assert "a prompt of 4" in shown
    assert "a token" in shown
    assert run([*arguments, "--profile", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["profile"]
    assert kernels.keys() == {"prompt", "token"}
    assert kernels["token"][0].keys() == {"kernel", "count", "ms", "share"}
    assert run([*arguments, "--json"]) == 0
    assert "profile" not in json.loads(capsys.readouterr().out)


def test_what_cannot_be_profiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copied(attention_bundle(), tmp_path / "bundle")
    with pytest.raises(OptionError, match="new_tokens is 0"):
        profile(bundle, new_tokens=0)
    with pytest.raises(ContextError, match="profile fewer"):
        profile(bundle, prompt_tokens=10**6)
    edit_manifest(bundle, target={"name": "cuda", "requires": {}})
    with pytest.raises(BackendError, match=r"target cuda, and only ONNX Runtime on CPU tells .* profile a bundle for"):
        profile(bundle)
    monkeypatch.setattr(bench, "bench", None)  # nothing is measured before it is told
    assert run(["bench", str(bundle), "--profile"]) == 1
