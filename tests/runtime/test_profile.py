"""Where the time of a prompt and of a token goes, as ``edgellm profile`` tells it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tensorrt_bundles import machine_with_gpu, made
from tiny_bundles import CONTEXT, attention_bundle, copied, edit_manifest, recurrent_bundle

from edgellm.cli import run
from edgellm_runtime import loading
from edgellm_runtime.backends.ort_device import OrtDeviceBackend
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks import profile_rounds
from edgellm_runtime.checks.bench import Workload
from edgellm_runtime.checks.kernel_events import Kernel, Run, node_of, read_runs, runs_of
from edgellm_runtime.checks.kernel_times import Spent, grouped, mean_of
from edgellm_runtime.checks.profile import Phase, Profile, TimedRun, profile
from edgellm_runtime.checks.profile_page import profile_page
from edgellm_runtime.checks.profile_report import report
from edgellm_runtime.checks.profile_rounds import Read, Rounds
from edgellm_runtime.checks.profile_sources import NOT_KNOWN
from edgellm_runtime.checks.profile_trace import profile_trace
from edgellm_runtime.checks.roofline import Roof, measure_roof
from edgellm_runtime.checks.traffic import Step, Traffic
from edgellm_runtime.errors import BackendError, ContextError, OptionError
from edgellm_runtime.graphs.layer_map import EMBEDDING, HEAD, SHARED, GraphNode

_ROOF = Roof(bytes_per_s=1e9, operations_per_s=1e10, threads=2, array_bytes=64 << 20)


@pytest.fixture
def _known_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_rounds, "measure_roof", lambda _threads: _ROOF)


@pytest.mark.usefixtures("_known_roof")
@pytest.mark.parametrize(
    ("bundle", "layers"), [(attention_bundle, ["layers.0", "layers.1"]), (recurrent_bundle, ["blocks.0"])]
)
def test_every_kernel_is_told_with_its_layer_and_its_bytes(bundle: Any, layers: list[str]) -> None:
    found = profile(bundle(), prompt_tokens=5, new_tokens=3, depth=4, rounds=2)
    nodes = Bundle(bundle()).manifest
    assert [name for name in found.layers if name != SHARED] == [EMBEDDING, *layers, HEAD]
    assert {phase.name for phase in found.phases} == {"prefill", "decode"}
    for phase in found.phases:
        assert len(phase.plain_rounds_ms) == len(phase.profiled_rounds_ms) == 2
        assert {kernel.layer for kernel in phase.kernels} <= found.layers.keys()
        assert all(kernel.count == 1 for kernel in phase.kernels)  # one graph, and each of its kernels once a step
        assert all(not kernel.unknown_ms for kernel in phase.kernels)
        assert 0 < phase.kernels_ms <= phase.run_ms
        for key in (lambda kernel: kernel.op, lambda kernel: kernel.layer):
            parts = grouped(phase.kernels, key)
            assert sum(part.ms for part in parts) == pytest.approx(phase.kernels_ms)
            assert sum(part.traffic.bytes for part in parts) == sum(k.traffic.bytes for k in phase.kernels)
    # a token's step reads all weights but the embedding's other rows; the state of an empty graph is none
    weights = sum(kernel.traffic.weights for kernel in found.phases[1].kernels)
    assert weights <= sum(file.bytes for file in nodes.files.values())


@pytest.mark.usefixtures("_known_roof")
def test_the_state_is_read_as_far_as_it_is_in_use() -> None:
    found = profile(attention_bundle(), prompt_tokens=5, new_tokens=1, depth=4, rounds=1)
    specs = Bundle(attention_bundle()).manifest.signature.state
    for phase, slots in zip(found.phases, (4 + 5, 9 + 1), strict=True):
        assert sum(kernel.traffic.state for kernel in phase.kernels) == sum(spec.nbytes(1, slots) for spec in specs)


def _reads(*seconds: float) -> list[Read]:
    """A prompt in two pieces, and tokens after it."""
    prompt = Read("prefill", seconds[0], [Step(0, 256, 512), Step(256, 44, 512)])
    return [prompt, *(Read("decode", each, [Step(300, 1, 512)]) for each in seconds[1:])]


def test_of_each_step_the_faster_half_of_its_rounds_counts() -> None:
    """So that later steps, which are slower for what they hold, count as often as earlier ones."""
    rounds = [_reads(3.0, 0.1, 0.2), _reads(2.0, 0.4, 0.3), _reads(9.0, 0.2, 0.5)]
    assert [read.seconds for read in Rounds.kept(rounds, "prefill")] == [2.0, 3.0]
    assert [read.seconds for read in Rounds.kept(rounds, "decode")] == [0.1, 0.2, 0.2, 0.3]


def test_runs_are_handed_to_the_steps_that_they_were_for() -> None:
    runs = [Run(float(at), 1.0, ()) for at in range(11)]
    rounds = Rounds([], [_reads(1.0, 1.0), _reads(1.0, 1.0)], warm=5, roof=_ROOF)
    rounds.give_runs(runs)
    assert [[run.start_us for run in read.runs] for each in rounds.profiled for read in each] == [
        [5.0, 6.0], [7.0], [8.0, 9.0], [10.0],
    ]  # fmt: skip
    with pytest.raises(BackendError, match="tells of 10 runs, and there were 11"):
        rounds.give_runs(runs[1:])


def _event(name: str, ts: int, dur: int, op: str = "MatMul", **args: Any) -> dict[str, Any]:
    told = {"op_name": op, "node_index": "0", "input_type_shape": [{"float": [1, 2]}], "activation_size": "8"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {**told, **args}}


_EVENTS = [
    {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 90, "args": {}},
    {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50, "args": {}},
    {"cat": "Session", "name": "model_run", "ts": 200, "dur": 50, "args": {}},
    _event("a", 110, 30), _event("b", 145, 5, "Scan"), _event("a", 210, 10),
    _event("c", 146, 2, "Add"),  # in the body of the loop
    _event("cast", 50, 5, "Cast"),  # of a weight, before any run
    {"cat": "Node", "name": "a_fence_before", "ts": 210, "dur": 1, "args": {"op_name": "MatMul"}},
]  # fmt: skip


def test_kernels_are_of_the_run_that_they_are_in_and_bodies_of_their_node(tmp_path: Path) -> None:
    runs = runs_of(_EVENTS)
    assert [[(k.name, k.us) for k in found.kernels] for found in runs] == [[("a", 30.0), ("b", 5.0)], [("a", 10.0)]]
    assert runs[0].kernels[0].given == ((1, 2),)
    assert runs[0].kernels[0].activation_bytes == 8
    file = tmp_path / "profile.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, _EVENTS)) + "\n]\n")
    assert read_runs(file) == runs
    file.write_text("[\n{\n]\n")
    with pytest.raises(BackendError, match="profile cannot be read"):
        read_runs(file)


def test_a_kernel_is_found_by_place_and_name_or_by_how_its_name_begins() -> None:
    nodes = [GraphNode(name, "Mul", (), (), {}) for name in ("mul_1", "mul_19", "twice", "twice")]
    names = Counter(node.name for node in nodes)

    def place(name: str, index: int | None) -> int | None:
        return node_of(Kernel(name, "Mul", index, 0, 1), nodes, names)

    assert place("mul_19", 1) == 1
    assert place("mul_19/QuickGeluFusion/", 7) == 1
    assert place("mul_1/Fusion/", 7) == 0
    assert place("twice", 3) == 3
    assert place("twice/Fusion/", 7) is None  # of either
    assert place("Squeeze_token_2", 8) is None


def _spent(op: str, layer: str, ms: float, traffic: Traffic | None = None) -> Spent:
    least = None if traffic is None else _ROOF.seconds(traffic)
    unknown = ms if traffic is None else 0.0
    told = traffic or Traffic(operations=None)
    return Spent(f"{op} {layer}", op, layer, 1, ms, told, unknown, None if least is None else 1e3 * least)


def test_the_roof_is_the_slower_of_memory_and_arithmetic() -> None:
    assert _ROOF.seconds(Traffic(weights=1e9, operations=1e9)) == 1.0
    assert _ROOF.bound(Traffic(weights=1e9, operations=1e9)) == "memory"
    assert _ROOF.seconds(Traffic(weights=1e9, operations=2e10)) == 2.0
    assert _ROOF.bound(Traffic(weights=1e9, operations=2e10)) == "arithmetic"
    assert _ROOF.seconds(Traffic(operations=None)) is _ROOF.bound(Traffic(operations=None)) is None


def test_a_machine_is_measured_with_the_threads_that_are_asked_for(tmp_path: Path) -> None:
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache/index3"
    cache.mkdir(parents=True)
    (cache / "size").write_text("20M\n")
    roof = measure_roof(1, tmp_path)
    assert (roof.threads, roof.array_bytes) == (1, 80 << 20)
    assert roof.bytes_per_s > 0 < roof.operations_per_s


def test_a_kernel_of_which_little_is_known_keeps_the_sum_from_being_known() -> None:
    known, unknown = _spent("MatMul", "h.0", 4.0, Traffic(weights=2e6)), _spent("Scan", "h.0", 6.0)
    assert (known.gb_per_s, known.roof_share) == (0.5, 0.5)
    assert (unknown.gb_per_s, unknown.roof_share) == (None, None)
    (both,) = grouped([known, unknown], lambda kernel: kernel.layer)
    assert (both.name, both.op, both.ms, both.unknown_ms, both.gb_per_s, both.roof_share) == (
        "h.0", "", 10.0, 6.0, None, None,
    )  # fmt: skip
    half = mean_of([known, known, known], 2)
    assert (half.count, half.ms, half.traffic.weights, half.roof_share) == (1.5, 6.0, 3e6, 0.5)


def _fake(bundle_layers: dict[str, int] | None = None) -> Profile:
    kernels = (
        _spent("MatMul", "h.0", 4.0, Traffic(weights=2e6, operations=1e6)),
        _spent("<Scan>", "h.1", 3.0),
        _spent("Gather", EMBEDDING, 1.0, Traffic(weights=1e6)),
    )
    phases = tuple(Phase(name, tokens, (10.0, 10.5), (11.0, 13.0), 10.0, 12.0, 9.0, kernels)
                   for name, tokens in (("prefill", 5), ("decode", 1)))  # fmt: skip
    run = Run(100.0, 90.0, (Kernel("g", "Gather", 0, 105.0, 10.0), Kernel("m", "MatMul", 1, 120.0, 40.0, ((1, 2), ())),
                            Kernel("n", "Add", 2, 161.0, 9.0)))  # fmt: skip
    timeline = (TimedRun("prefill", Step(0, 5, 16), run),)
    layers = bundle_layers or {EMBEDDING: 1, "h.0": 2, "h.1": 1, HEAD: 3}
    names = {("g", 0): EMBEDDING, ("m", 1): "h.0", ("n", 2): "h.0"}
    return Profile(Workload(5, 1), "cpu", 2, _ROOF, layers, phases, timeline, names)


def test_the_parts_of_a_step_add_up_and_the_profiler_is_told_beside_them() -> None:
    phase = report(_fake(), "b")["phases"]["decode"]
    assert phase["step_ms"] == 12.0
    assert phase["kernels_ms"] + phase["between_kernels_ms"] + phase["outside_library_ms"] == phase["step_ms"]
    assert phase["profiler_overhead"] == pytest.approx(0.2)
    assert report(_fake(), "b")["doubts"][0].startswith("rounds differ by more than 10%")
    assert [sum(row["ms"] for row in phase[part]) for part in ("operators", "layers", "kernels")] == [8.0, 8.0, 8.0]
    assert [(row["name"], row["nodes"], row["ms"]) for row in phase["layers"]] == [
        (EMBEDDING, 1, 1.0), ("h.0", 2, 4.0), ("h.1", 1, 3.0), (HEAD, 3, 0.0),
    ]  # fmt: skip
    product, loop = phase["operators"][:2]
    assert (product["gb_per_s"], product["roof_share"], product["bound"]) == (0.5, 0.5, "memory")
    assert (loop["bytes"], loop["gb_per_s"], loop["flops"], loop["roof_share"]) == (None, None, None, None)
    assert phase["step"]["gb_per_s"] is phase["step"]["roof_share"] is None


def test_the_page_needs_no_other_file_and_says_what_is_not_known() -> None:
    page = profile_page(report(_fake(), "<bundle>"))
    assert "&lt;bundle&gt;" in page
    assert "&lt;Scan&gt;" in page
    assert NOT_KNOWN in page
    assert "<bundle>" not in page
    assert "<Scan>" not in page
    assert not any(word in page for word in ("http", "src=", "<link", "<script", "@import", "url("))
    assert page.count('class="bar"') == 2 * 4  # a bar for each layer of each phase
    assert page.count("<summary>3 kernels by themselves") == 2
    assert page.count("<polyline") == 2  # a roof for each phase


def test_the_timeline_nests_kernels_in_layers_in_steps() -> None:
    events = profile_trace(_fake(), "b")["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event.keys() >= {"pid", "tid", "name", "ts", "dur"} for event in spans)
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    told = [(tracks[e["tid"]], e["name"], e["ts"], e["dur"]) for e in spans]
    assert told == [
        ("steps", "prefill", 0.0, 90.0), ("layers", EMBEDDING, 5.0, 10.0), ("layers", "h.0", 20.0, 50.0),
        ("kernels", "Gather", 5.0, 10.0), ("kernels", "MatMul", 20.0, 40.0), ("kernels", "Add", 61.0, 9.0),
    ]  # fmt: skip
    assert spans[4]["args"] == {"node": "m", "layer": "h.0", "inputs": "1x2 scalar", "outputs": ""}


@pytest.mark.usefixtures("_known_roof")
def test_the_command_prints_tables_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, trace = tmp_path / "profile.html", tmp_path / "trace.json"
    arguments = ["profile", str(attention_bundle()), "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"]
    assert run([*arguments, "--html", str(page), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "a prompt of 4 tokens" in shown
    assert "layers.1" in shown
    assert "1.0 GB/s" in shown
    assert page.read_text().startswith("<!doctype html>")
    assert {e["ph"] for e in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "edgellm profile 1"
    assert found["phases"].keys() == {"prefill", "decode"}
    layers = {row["name"]: row["nodes"] for row in found["phases"]["decode"]["layers"]}
    assert layers.keys() == {SHARED, EMBEDDING, "layers.0", "layers.1", HEAD}


def test_what_cannot_be_profiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copied(attention_bundle(), tmp_path / "bundle")
    for wrong, said in (({"new_tokens": 0}, "new_tokens is 0"), ({"rounds": 0}, "rounds is 0"), ({"depth": -1}, "dep")):
        with pytest.raises(OptionError, match=said):
            profile(bundle, **wrong)
    with pytest.raises(ContextError, match="do not fit"):
        profile(bundle, prompt_tokens=10**6)
    monkeypatch.setattr(profile_rounds, "measure_roof", None)  # nothing is measured before it is told
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    edit_manifest(bundle, target={"name": "cuda", "requires": {}})
    with pytest.raises(BackendError, match=r"does not wait for its kernels on a GPU.* set CUDA_LAUNCH_BLOCKING=1"):
        profile(bundle)
    assert run(["profile", str(bundle)]) == 1
    assert run(["profile", str(bundle), "--html", str(tmp_path / "none" / "p.html")]) == 1


def test_on_a_gpu_the_roof_is_not_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of CUDA, run by the CPU's kernels."""
    bundle = Bundle(attention_bundle())

    def backend(*given: Any) -> OrtDeviceBackend:
        notes = next((value for value in given if isinstance(value, Path)), None)
        made = OrtDeviceBackend(
            bundle.file(GRAPH), bundle.manifest.signature, max_context=CONTEXT, device="cpu", profile=notes
        )
        made.device = "cuda"
        return made

    monkeypatch.setattr(loading, "_backend", backend)
    monkeypatch.setattr(profile_rounds, "measure_roof", None)
    arguments = ["profile", str(attention_bundle()), "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["roof"]) == ("cuda", None)
    for phase in found["phases"].values():
        assert all(row["roof_share"] is row["bound"] is None for row in phase["operators"])
        assert all(row["bytes"] is not None for row in phase["operators"])  # which no machine has a part in
    assert "this device is not measured" in profile_page(found)
    assert run(arguments) == 0
    assert "Roof: not known on device cuda" in capsys.readouterr().out


def test_layers_of_engines_are_told_as_far_as_their_names_go(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_with_gpu(monkeypatch)
    found = profile(made("attention"), prompt_tokens=40, new_tokens=3, rounds=1)
    assert machine.cuda.recording is None
    bundle = Bundle(made("attention")).manifest
    pieces = math.ceil(40 / bundle.graphs["prefill"].time)
    for phase, runs in zip(found.phases, (pieces, 1), strict=True):
        assert (phase.run_ms, phase.kernels_ms) == (None, 4 * 0.5 * runs)
        first, pair, several, own = sorted(phase.kernels, key=lambda k: ("Reformat" in k.name, "Foreign" in k.name,
                                                                         "+" in k.name))  # fmt: skip
        assert NOT_KNOWN not in (first.op, pair.op, first.layer)
        assert several.op == own.op == several.layer == own.layer == NOT_KNOWN
        assert all(kernel.unknown_ms == kernel.ms for kernel in phase.kernels)
    page = report(found, "b")
    assert page["roof"] is page["phases"]["decode"]["between_kernels_ms"] is None
    assert page["phases"]["decode"]["operators"][0]["bytes"] is None
