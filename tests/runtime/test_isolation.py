"""``load(isolate=True)``: what crashes, hangs or eats memory does so in a process of its own, told in a sentence."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx import helper
from tiny_bundles import attention_bundle, copied, recurrent_bundle, sign

from edgellm_runtime import BackendError, BundleError, OptionError, load
from edgellm_runtime.isolation import Limits, _fault, limits_for, rehearse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
LIMITS = Limits(4 << 30, 20)


@pytest.mark.parametrize("make", [attention_bundle, recurrent_bundle])
def test_bundle_loads_in_isolation_and_then_answers_as_without(make: object) -> None:
    path = make()  # type: ignore[operator]
    model, plain = load(path, isolate=True, threads=1), load(path, threads=1)
    assert model.session.device == "cpu"
    tokens = [1, 2, 3]
    assert model.generate(tokens, max_new_tokens=4).tokens == plain.generate(tokens, max_new_tokens=4).tokens


def greedy_for(bundle: Path, *, sides: int, products: int) -> None:
    """Make each step multiply matrices whose sizes come from its inputs, so that no rule sees them."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for i, name in enumerate(node.output):
            if name == "logits":
                node.output[i] = "logits0"
    value = onnx.numpy_helper.from_array
    for name, array in (("sides", np.array([sides, sides])), ("from", np.array([0])), ("to", np.array([1]))):
        graph.graph.initializer.append(value(array, name))
    graph.graph.initializer.append(value(np.array(0.0, np.float32), "nothing"))
    made = [
        helper.make_node("Shape", ["tokens"], ["shape"]), helper.make_node("Slice", ["shape", "from", "to"], ["rows"]),
        helper.make_node("Mul", ["rows", "sides"], ["sizes"]), helper.make_node("ConstantOfShape", ["sizes"], ["m0"]),
    ]  # fmt: skip
    made += [helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(products)]
    made += [
        helper.make_node("ReduceSum", [f"m{products}"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["zero"]), helper.make_node("Add", ["logits0", "zero"], ["logits"]),
    ]  # fmt: skip
    graph.graph.node.extend(made)
    (bundle / "model.onnx").write_bytes(graph.SerializeToString())
    sign(bundle, "model.onnx")


def test_graph_that_takes_the_memory_in_its_first_step_is_refused(tmp_path: Path) -> None:
    bundle = copied(recurrent_bundle(), tmp_path)
    greedy_for(bundle, sides=1 << 16, products=1)
    with pytest.raises(BundleError, match=r"loading it takes more than 4\.3 GB; do not load it"):
        rehearse(bundle, device="auto", checksums=True, limits=LIMITS)


def test_graph_that_never_ends_its_first_step_is_refused(tmp_path: Path) -> None:
    bundle = copied(recurrent_bundle(), tmp_path)
    greedy_for(bundle, sides=4096, products=2000)
    started = time.monotonic()
    with pytest.raises(BundleError, match=r"loading it takes more than \d+ s"):
        rehearse(bundle, device="auto", checksums=True, limits=Limits(4 << 30, 3))
    assert time.monotonic() - started < 30


def test_fault_in_isolation_is_the_fault_of_loading(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist; a bundle is the directory"):
        load(tmp_path / "none", isolate=True)
    bundle = copied(attention_bundle(), tmp_path)
    (bundle / "tokenizer.json").write_text("{}")
    sign(bundle, "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        load(bundle, isolate=True)  # without, it is read with the first text
    (bundle / "chat_template.jinja").write_text("{{ 1/0 }}")
    (bundle / "tokenizer.json").write_bytes((attention_bundle() / "tokenizer.json").read_bytes())
    sign(bundle, "tokenizer.json", "chat_template.jinja")
    with pytest.raises(BundleError, match="the chat template failed"):
        load(bundle, isolate=True)
    with pytest.raises(BackendError, match="cuda"):
        load(bundle, isolate=True, device="cuda")


def test_how_a_process_ended_becomes_a_sentence() -> None:
    def said(status: int, report: object = None) -> str:
        return str(_fault("b", status, json.dumps(report).encode() if report else b"", LIMITS))

    assert said(-signal.SIGSEGV) == "b: loading it ended the process that tried (SIGSEGV); do not load it"
    assert said(-signal.SIGXCPU) == "b: loading it takes more than 20 s of processor time; do not load it"
    assert said(3) == "b: loading it ended the process that tried (status 3); do not load it"
    assert said(0) == "b: loading it ended the process that tried (status 0); do not load it"
    assert said(0, {"kind": "loaded"}) == "None"
    assert said(0, {"kind": "StateError", "said": "x"}) == "x"


def test_platform_without_limits_is_named_and_nothing_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OptionError, match=r"isolate=True needs Linux and a Python interpreter of its own \(win32, "):
        load(recurrent_bundle(), isolate=True)


def test_limits_grow_with_the_weights_and_not_with_holes(tmp_path: Path) -> None:
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(8 << 40)
    found = limits_for(tmp_path)
    assert limits_for(tmp_path / "none").memory == 4 << 30
    assert found.memory < 1 << 44
