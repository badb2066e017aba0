"""docs/bundle-format.md says what is written, no more and no less."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_bundles import CONTEXT, attention_bundle, hidden_bundle, recurrent_bundle, window_bundle

from edgellm_exporters.graph.capture import INPUTS
from edgellm_exporters.quantize.methods import METHODS
from edgellm_runtime.bundle import FORMAT, Bundle
from edgellm_runtime.bundle.engine_info import ChooserInfo
from edgellm_runtime.bundle.limits import MAX_MANIFEST_BYTES
from edgellm_runtime.bundle.manifest import _KEYS
from edgellm_runtime.checks.verify import AT_LEAST
from edgellm_runtime.graphs.external_files import external_files
from edgellm_runtime.graphs.token_choice import MOST, RESULTS
from edgellm_runtime.spec import DTYPE_BYTES
from edgellm_runtime.task_spec import TaskSpec

PAGE = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("make", [attention_bundle, recurrent_bundle, window_bundle, hidden_bundle])


def table(header: str) -> dict[str, list[str]]:
    """The rows of the table that begins with this header, by their first cell."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.split(r"`, (?=`)", cells[0]):
            rows[name.strip("`")] = cells[1:]
    return rows


def manifest(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return data


OF_FIXED_SIZES = {"graphs", "capacity", "engines", "choosers"}
OF_SOME = OF_FIXED_SIZES | {"drafter", "adapters", "encoder", "generation", "receipt"}  # what only some bundles say


def test_graphs_and_engines_have_the_documented_keys() -> None:
    from engine_manifests import engine
    from engine_manifests import manifest as of_graphs

    chooser = ChooserInfo(1, engine("choose"))
    written = of_graphs(engine("prefill"), engine("decode"), choosers=(chooser,)).to_json()
    assert written.keys() >= OF_FIXED_SIZES
    assert {key for graph in written["graphs"].values() for key in graph} == {"file", "time"}
    section = PAGE[PAGE.index("An entry of `engines` has these keys") :]
    documented = set(re.findall(r"^\| `(\w+)` \|", section[: section.index("## ")], re.M))
    assert all(row.keys() == documented for row in written["engines"])
    assert written["choosers"][0].keys() == documented | {"count"}
    results = table("| output | shape | dtype |")
    assert {name: row[1] for name, row in results.items()} == RESULTS
    assert f"at most {MOST}" in PAGE


@BOTH
def test_manifest_has_the_documented_keys_of_the_documented_types(make: Any) -> None:
    data, documented = manifest(make()), table("| key | type | required |")
    assert data.keys() == documented.keys() - OF_SOME
    assert {k for k, row in documented.items() if row[1] == "yes"} == _KEYS
    kinds = {
        "integer ≥ 1": int, "integer ≥ 0": int, "string": str, "object": dict, "boolean": bool,
        "object or null": (dict, type(None)),
    }  # fmt: skip
    for key, (kind, *_) in documented.items():
        if key in OF_SOME or key not in data:
            continue
        assert isinstance(data[key], kinds[kind]), key
    assert data["format"] == 1  # of all but what readers of 1 would run wrongly
    assert int(re.search(r"format, version (\d+)", PAGE)[1]) == FORMAT  # type: ignore[index]


def test_tokenizer_and_target_have_the_documented_keys() -> None:
    data = manifest(attention_bundle())
    documented = PAGE[PAGE.index("`tokenizer` has these keys") :]
    assert data["tokenizer"].keys() == set(
        re.findall(r"^\| `(\w+)` \|", documented[: documented.index("`task` has")], re.M)
    )
    task = PAGE[PAGE.index("| task key | type |") :]
    assert {"name", *re.findall(r"^\| `(\w+)` \|", task[: task.index("`generation` has")], re.M)} == {
        field.name for field in dataclasses.fields(TaskSpec)
    }
    assert data["target"].keys() == {"name", "requires"}
    assert manifest(recurrent_bundle())["tokenizer"] is None


@BOTH
def test_signature_is_as_documented(make: Any) -> None:
    signature = manifest(make())["signature"]
    assert signature.keys() == {"inputs", "outputs", "state"}
    entries = table("| list | keys of an entry |")
    for name, rows in signature.items():
        for row in rows:
            kind = "state`, of a ring" if row.get("update") == "ring" else name
            assert row.keys() == set(re.findall(r"`(\w+)`", entries[kind][0]))
    graph = table("| name | shape | dtype |")
    assert [t.name for t in INPUTS] == [
        n for n in graph if "NAME" not in n and n not in ("logits", "hidden", "total_length")
    ]
    for spec in INPUTS:
        shape, dtype, _ = graph[spec.name]
        assert shape == f"({', '.join(map(str, spec.shape))})"
        assert dtype == spec.dtype
    assert set(re.findall(r"`(\w+)`", PAGE[PAGE.index("A dtype is one of") :].split(".\n")[0])) == set(DTYPE_BYTES)
    assert {row["update"] for row in signature["state"]} <= table("| update | shape | rule |").keys()


@BOTH
def test_files_are_those_documented_and_listed(make: Any) -> None:
    bundle = make()
    data, documented = manifest(bundle), table("| file | there |")
    found = {f.name for f in bundle.iterdir()}
    assert found == data["files"].keys() | {"manifest.json"}
    always = {name for name, row in documented.items() if row[0] in ("always", "unless `graphs`")}
    assert always <= found <= documented.keys()
    assert (found == always) == (data["tokenizer"] is None)
    for name, info in data["files"].items():
        content = (bundle / name).read_bytes()
        assert info == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert MAX_MANIFEST_BYTES == 1 << 20


@BOTH
def test_graph_has_the_documented_inputs_and_outputs(make: Any) -> None:
    bundle = make()
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    states = [s["name"] for s in manifest(bundle)["signature"]["state"]]
    inputs, outputs = {i.name for i in graph.input}, {o.name for o in graph.output}
    assert inputs <= {t.name for t in INPUTS} | {f"past.{name}" for name in states}
    given = {row["name"] for row in manifest(bundle)["signature"]["outputs"]}
    assert given == ({"logits", "hidden"} if make is hidden_bundle else {"logits"})
    assert outputs == given | {f"present.{name}" for name in states}
    assert external_files((bundle / "model.onnx").read_bytes()) == {"model.onnx.data"}
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert int(place.get("offset", 0)) % 64 == 0
        assert len(tensor.raw_data) < 1024


@BOTH
def test_goldens_are_as_documented(make: Any) -> None:
    bundle = make()
    data = json.loads((bundle / "goldens.json").read_text())
    assert data.keys() == {"format", "traces", "meaning", "layers", "far"}
    assert data["format"] == 1
    keys = table("| key | shape | meaning |").keys()
    for trace in data["traces"]:
        assert trace.keys() == keys - {"source"} - ({"hidden"} if make is not hidden_bundle else set())
        assert trace["state"].keys() == {s["name"] for s in manifest(bundle)["signature"]["state"]}
        assert all(sample.keys() == {"index", "values"} for sample in trace["state"].values())
        assert len(trace["tokens"]) <= CONTEXT
    sentence = PAGE[PAGE.index("A check of `bounds`") :].split(". ")[0]
    checks = set(re.findall(r"`(\w+)`", sentence)) - {"bounds"}
    assert checks - {"meaning"} == set().union(*(method.bounds for method in METHODS.values()))
    assert {"top1", "greedy"} == AT_LEAST


@BOTH
def test_manifest_written_again_is_the_same_bytes(make: Any) -> None:
    bundle = make()
    text = json.dumps(Bundle(bundle).manifest.to_json(), indent=1) + "\n"
    assert (bundle / "manifest.json").read_text(encoding="utf-8") == text


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    from tiny_bundles import copied, edit_manifest

    bundle = copied(recurrent_bundle(), tmp_path)
    edit_manifest(bundle, later_addition={"a": [1]})
    assert Bundle(bundle).manifest == Bundle(recurrent_bundle()).manifest
