"""Bundles that are damaged, foreign, newer or hostile: one clear sentence, exit status 1, nothing parsed too early."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from refusals import refusal
from tiny_bundles import attention_bundle, copied, edit_manifest, recurrent_bundle, sign, window_bundle

from edgellm.cli import run
from edgellm_runtime import BackendError, BundleError, OptionError, RuntimeFault, load, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import read_goldens, verify

COMMANDS = (["verify"], ["inspect"], ["generate", "x"], ["bench", "--rounds", "1"])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copied(recurrent_bundle(), tmp_path)


def refused(capsys: pytest.CaptureFixture[str], bundle: Path) -> str:
    """The sentence of ``verify``; opening it in Python says the same."""
    message = refusal(capsys, "verify", str(bundle))
    with pytest.raises(RuntimeFault) as caught:
        load(bundle)
    assert " ".join(str(caught.value).split()) == message
    return message


def test_path_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, tmp_path / "none")
    assert message == f"{tmp_path / 'none'}: does not exist; a bundle is the directory that 'edgellm export' wrote"


def test_path_that_is_a_file(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    assert "model.onnx: is not a directory; a bundle is the directory" in refused(capsys, bundle / "model.onnx")


def test_directory_without_a_manifest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}: has no manifest.json" in refused(capsys, tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "goldens.json"])
def test_missing_file(capsys: pytest.CaptureFixture[str], bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refused(capsys, bundle) == f"{bundle / name}: missing or not a plain file; copy the bundle again"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "goldens.json"])
def test_truncated_file(capsys: pytest.CaptureFixture[str], bundle: Path, name: str) -> None:
    size = (bundle / name).stat().st_size
    with (bundle / name).open("r+b") as file:
        file.truncate(size - 1)
    assert refused(capsys, bundle) == f"{bundle / name}: {size - 1} bytes instead of {size}; copy the bundle again"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "goldens.json"])
def test_changed_byte(capsys: pytest.CaptureFixture[str], bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    message = refused(capsys, bundle)
    assert message.startswith(f"{bundle / name}: checksum ")
    assert message.endswith("the file was changed, copy it again")


def test_newer_format(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    edit_manifest(bundle, format=3, signature="in a form of the future")
    assert refused(capsys, bundle).endswith("format 3, this runtime reads up to 2; install a newer edgellm")


@pytest.mark.parametrize("value", ["1", None, True, 0, -1, 1.0])
def test_format_that_is_none(capsys: pytest.CaptureFixture[str], bundle: Path, value: Any) -> None:
    edit_manifest(bundle, format=value)
    assert "not an edgellm manifest; export the model again" in refused(capsys, bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"a": NaN', "[" * 100_000])
def test_manifest_that_is_not_an_object(capsys: pytest.CaptureFixture[str], bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin1"))
    assert "manifest.json: not " in refused(capsys, bundle)


def test_oversized_manifest_is_not_read(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: nothing is stored
    assert "1099511627776 bytes are too many for a manifest" in refused(capsys, bundle)


@pytest.mark.parametrize("key", ["signature", "files", "max_context", "target"])
def test_missing_key(capsys: pytest.CaptureFixture[str], bundle: Path, key: str) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest[key]
    file.write_text(json.dumps(manifest))
    assert refused(capsys, bundle) == f"{file}: ['{key}'] missing; export the model again"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"max_context": 0}, "0 is not a whole number from 1"),
        ({"max_context": "96"}, "'96' is not a whole number"),
        ({"ragged_chunks": "no"}, "'no' is not a bool"),
        ({"name": 3}, "3 is not a str"),
        ({"name": "a\x1b[2Jb"}, "holds control characters"),
        ({"provenance": {"source": ["\x07"]}}, "holds control characters"),
        ({"name": "\ud800"}, "holds control characters"),
        ({"target": {}}, "'name'"),
        ({"bounds": {"kl": "low"}}, "'low' is not a finite number"),
        ({"bounds": {"kl": 1e999}}, "inf is not a finite number"),
        ({"tokenizer": {}}, "damaged"),
        (
            {"tokenizer": {"eos_token_ids": [-1], "add_bos": False, "has_chat_template": False}},
            "-1 is not a whole number",
        ),
    ],
)
def test_wrong_value(capsys: pytest.CaptureFixture[str], bundle: Path, changes: dict[str, Any], what: str) -> None:
    edit_manifest(bundle, **changes)
    message = refused(capsys, bundle)
    assert what in message
    assert message.endswith("export the model again")


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/passwd", "..", ".hidden", "", "a\\b", "a\0b", "x" * 256])
def test_file_name_that_leads_elsewhere(capsys: pytest.CaptureFixture[str], bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_text("secret")
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit_manifest(bundle, files=manifest["files"] | {name: {"bytes": 6, "sha256": "0"}})
    message = refused(capsys, bundle)
    assert "is not a plain name inside" in message or "control characters" in message  # what is long loses its end


def test_symbolic_link(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    (bundle / "model.onnx.data").rename(bundle.parent / "outside")
    (bundle / "model.onnx.data").symlink_to(bundle.parent / "outside")
    assert "model.onnx.data: a symbolic link to " in refused(capsys, bundle)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_not_waited_for(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    (bundle / "goldens.json").unlink()
    os.mkfifo(bundle / "goldens.json")
    assert "goldens.json: missing or not a plain file" in refused(capsys, bundle)


def put_graph(bundle: Path, data: bytes) -> None:
    """A graph that the manifest vouches for."""
    (bundle / "model.onnx").write_bytes(data)
    sign(bundle, "model.onnx")


@pytest.mark.parametrize("location", ["../outside", "/etc/passwd", "other", "*/_ORT_MEM_ADDR_/*"])
def test_graph_that_reads_another_file(capsys: pytest.CaptureFixture[str], bundle: Path, location: str) -> None:
    (bundle.parent / "outside").write_bytes(bytes(64))
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    hidden = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value=location)
    model.graph.node.append(helper.make_node("Constant", [], ["leak"], value=hidden))
    put_graph(bundle, model.SerializeToString())
    assert refused(capsys, bundle).endswith(
        f"reads ['{location}'], which the manifest does not list; refusing to follow"
    )


@pytest.mark.parametrize("data", [b"", b"\x00", b"not a graph", b"\x08\x08" * 3, bytes(range(256))])
def test_garbage_graph(capsys: pytest.CaptureFixture[str], bundle: Path, data: bytes) -> None:
    put_graph(bundle, data)
    message = refused(capsys, bundle)
    assert "not an ONNX graph" in message or "refuses the graph" in message


def test_graph_that_is_not_the_manifests(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (bundle / name).write_bytes((attention_bundle() / name).read_bytes())
    sign(bundle, "model.onnx", "model.onnx.data")
    assert "(logits has sizes [None, None, 292], and ['batch', 'count', 61] in the manifest)" in refused(capsys, bundle)


def test_weights_cut_short_with_a_manifest_that_agrees(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    (bundle / "model.onnx.data").write_bytes(b"short")
    sign(bundle, "model.onnx.data")
    message = refused(capsys, bundle)
    assert "model.onnx: reads '" in message
    assert message.endswith("of model.onnx.data, which has 5; copy the bundle again")


def test_unlisted_graph(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    edit_manifest(bundle, files={})
    assert "lists no model.onnx; export the model again" in refused(capsys, bundle)


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ({"onnxruntime": "99.1"}, "needs ONNX Runtime 99.1, here is"),
        ({"openvino": "10"}, "which this runtime does not know; install a newer edgellm"),
        ({"tensorrt": "10"}, "runs with tensorrt, not with ONNX Runtime; use device 'tensorrt'"),
        ([], "which this runtime does not know"),
    ],
)
def test_library_that_is_not_here(
    capsys: pytest.CaptureFixture[str], bundle: Path, requires: Any, message: str
) -> None:
    edit_manifest(bundle, target={"name": "cpu", "requires": requires})
    assert message in refused(capsys, bundle)


@pytest.mark.parametrize("tokenizer", [b"", b"{}", b"\xff"])
def test_garbage_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: bytes) -> None:
    spoiled = copied(attention_bundle(), tmp_path)
    (spoiled / "tokenizer.json").write_bytes(tokenizer)
    sign(spoiled, "tokenizer.json")
    assert "tokenizer.json: not a tokenizer" in refusal(capsys, "generate", str(spoiled), "x")


@pytest.mark.parametrize("template", ["{% for", "{{ messages.x.y }}", "\x00{{ ''.__class__.__mro__ }}", "{{ 1/0 }}"])
def test_broken_chat_template(capsys: pytest.CaptureFixture[str], tmp_path: Path, template: str) -> None:
    spoiled = copied(attention_bundle(), tmp_path)
    (spoiled / "chat_template.jinja").write_text(template)
    sign(spoiled, "chat_template.jinja")
    assert "the chat template failed" in refusal(capsys, "generate", str(spoiled), "x")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traces": []}', '{"traces": [{}]}', '{"traces": 3}'])
def test_garbage_goldens(capsys: pytest.CaptureFixture[str], bundle: Path, text: str) -> None:
    (bundle / "goldens.json").write_text(text)
    sign(bundle, "goldens.json")
    assert "goldens.json: " in refusal(capsys, "verify", str(bundle))


def test_bundle_without_goldens_or_bounds_is_not_called_verified(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    edit_manifest(bundle, bounds={})
    assert "states no bounds to verify" in refusal(capsys, "verify", str(bundle))
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit_manifest(bundle, files={n: f for n, f in manifest["files"].items() if n != "goldens.json"})
    assert "has no goldens.json; export the model again with it" in refusal(capsys, "verify", str(bundle))


def test_wrong_weights_with_a_manifest_that_agrees_fail_verification(
    capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    data = np.fromfile(bundle / "model.onnx.data", dtype=np.float32)
    (data * 1.01).astype(np.float32).tofile(bundle / "model.onnx.data")
    sign(bundle, "model.onnx.data")
    assert run(["verify", str(bundle), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert {c["name"] for c in result["checks"] if not c["ok"]} >= {"logits"}


def test_not_a_number_in_the_weights_fails_verification(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    data = np.fromfile(bundle / "model.onnx.data", dtype=np.float32)
    np.full_like(data, np.nan).tofile(bundle / "model.onnx.data")
    sign(bundle, "model.onnx.data")
    with np.errstate(all="ignore"):
        assert run(["verify", str(bundle), "--json"]) == 1
    failed = {c["name"] for c in json.loads(capsys.readouterr().out)["checks"] if not c["ok"]}
    assert failed >= {"logits", "kl", "state", "split", "batch"}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_refuses_alike(capsys: pytest.CaptureFixture[str], bundle: Path, arguments: list[str]) -> None:
    edit_manifest(bundle, format=7)
    command, *rest = arguments
    assert "format 7, this runtime reads up to 2" in refusal(capsys, command, str(bundle), *rest)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.integers(), st.just(10**400), st.floats(), st.text(max_size=5),
    st.sampled_from(["batch", "capacity", "float64", "bfloat16", "replace", "append", "ring", "static", "time", "²"]),
    st.just("model.onnx"),
    st.lists(st.integers(0, 3), max_size=2), st.just({}), st.just([[[], 1]]),
)  # fmt: skip


def mutate(data: st.DataObject, value: Any) -> Any:
    """One place of a JSON value, chosen at random, becomes something else."""
    if isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 7)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        changed = dict(value) if isinstance(value, dict) else list(value)
        action = data.draw(st.integers(0, 9))
        if action == 0:
            del changed[key]
        elif action == 1 and isinstance(changed, dict):
            changed[data.draw(st.text(max_size=4))] = changed.pop(key)
        else:
            changed[key] = mutate(data, value[key])
        return changed
    return data.draw(VALUES)


@pytest.mark.parametrize("make", [recurrent_bundle, attention_bundle, window_bundle])
def test_no_mutation_of_the_manifest_raises_anything_else(make: Any, tmp_path: Path) -> None:
    bundle = copied(make(), tmp_path)
    original = json.loads((bundle / "manifest.json").read_text())

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        changed = original
        for _ in range(data.draw(st.integers(1, 2))):
            changed = mutate(data, changed)
        (bundle / "manifest.json").write_text(json.dumps(changed))
        with suppress(BundleError):
            assert json.loads(json.dumps(Bundle(bundle, checksums=False).manifest.to_json()))

    check()


def halve(signature: Any) -> None:
    signature["state"][0]["shape"][-1] //= 2


def double(signature: Any) -> None:
    signature["state"][0]["shape"][-1] *= 2


def retype(signature: Any) -> None:
    signature["state"][0]["dtype"] = "float64"


def shrink(signature: Any) -> None:
    signature["outputs"][0]["shape"][-1] -= 1


def retype_logits(signature: Any) -> None:
    signature["outputs"][0]["dtype"] = "float64"


@pytest.mark.parametrize("change", [halve, double, retype, shrink, retype_logits])
@pytest.mark.parametrize("make", [recurrent_bundle, attention_bundle])
def test_shape_or_type_that_is_not_the_graphs_is_never_written_past(make: Any, change: Any, tmp_path: Path) -> None:
    """Nor where the graph does not say it, and the library finds out in a step."""
    bundle = copied(make(), tmp_path)
    signature = json.loads((bundle / "manifest.json").read_text())["signature"]
    change(signature)
    edit_manifest(bundle, signature=signature)
    with pytest.raises(BundleError, match=r"as the manifest says|in the manifest"):
        Bundle(bundle)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.ClearField("shape")
    put_graph(bundle, graph.SerializeToString())
    with suppress(BundleError):  # a type is always said
        session = open_session(Bundle(bundle), threads=1)
        with pytest.raises(BackendError, match="ONNX Runtime failed in a step"):
            session.step(np.ones((2, 3), dtype=np.int64), session.new_state(2))


def test_no_mutation_of_the_goldens_raises_anything_else(bundle: Path) -> None:
    original = json.loads((bundle / "goldens.json").read_text())
    opened = Bundle(bundle)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        (bundle / "goldens.json").write_text(json.dumps(mutate(data, original)))
        with suppress(BundleError):
            read_goldens(opened)

    check()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [5, 61]}, {"tokens": [5, -1]}, {"greedy": list(range(60)) * 3},
        {"state": {}}, {"state": {"blocks.0.h": {"index": [999], "values": [1.0]}}},
    ],
)  # fmt: skip
def test_goldens_of_another_model_fail_or_are_refused(bundle: Path, change: dict[str, Any]) -> None:
    file = bundle / "goldens.json"
    goldens = json.loads(file.read_text())
    trace = goldens["traces"][0]
    for key in ("tokens", "top_ids", "top_logits", "logsumexp"):
        trace[key] = trace[key][:2]
    trace |= change
    file.write_text(json.dumps(goldens))
    sign(bundle, "goldens.json")
    opened = Bundle(bundle)
    with suppress(RuntimeFault):
        assert not verify(opened, open_session(opened, threads=1)).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "warp"}, "unknown device 'warp'"),
        ({"threads": 0}, "threads is 0; it must be"),
        ({"threads": -1}, "threads is -1; it must be"),
    ],
)
def test_impossible_device_or_threads(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError if "threads" in arguments else BackendError, match=message):
        load(recurrent_bundle(), **arguments)
