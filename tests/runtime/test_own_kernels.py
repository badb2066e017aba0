"""Kernels of edgellm's own: who may choose them, what is put in which node's place, and what runs where they cannot."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from expert_graphs import mixture_graph
from tiny_bundles import attention_model, sign, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.quantize.plan import ROW, Scheme
from edgellm_runtime import BackendError, OptionError, load
from edgellm_runtime.backends import own_kernels, own_trial
from edgellm_runtime.backends.own_kernels import INTERFACE, OwnKernels, Unusable
from edgellm_runtime.checks.doctor import diagnose
from edgellm_runtime.graphs.operators import TARGETS
from edgellm_runtime.graphs.own_operators import DOMAIN, OPERATORS
from edgellm_runtime.kernel_choice import VARIABLE, chosen_kernels

KERNELS = OwnKernels(Path("nowhere"), "none", "")


@functools.cache
def bundle() -> Path:
    folder = Path(tempfile.mkdtemp()) / "int4"
    export(attention_model(), folder, text=text_assets(), options=ExportOptions(target="cpu", quantize="int4"))
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(own_kernels, "_TOLD", set())


def package(**change: Any) -> SimpleNamespace:
    """An installed package as edgellm looks at it, whose library is a file of no use."""
    parts = {"INTERFACE": INTERFACE, "__version__": "0.1.0", "library": lambda: Path(__file__), "form": lambda: "avx2"}
    return SimpleNamespace(**(parts | change))


def missing() -> Path:
    raise FileNotFoundError("the folder has no library")


def broken() -> str:
    raise OSError("invalid ELF header")


UNUSABLE: dict[str, tuple[Any, str]] = {
    "not installed": (None, "edgellm-kernels is not installed"),
    "of another release": (
        package(INTERFACE=INTERFACE + 1),
        f"of interface {INTERFACE + 1}, this edgellm of {INTERFACE}",
    ),
    "without its library": (package(library=missing), "does not load .the folder has no library"),
    "of another machine": (package(form=broken), "does not load .invalid ELF header"),
    "on an old processor": (
        package(form=lambda: ""),
        "no form for this processor, which lacks AVX2",
    ),
    "refused by ONNX Runtime": (package(), r"ONNX Runtime [\d.]+ refuses edgellm-kernels"),
}


@pytest.mark.parametrize(("installed", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_where_they_cannot_run_one_line_says_so_and_onnx_runtime_computes(
    installed: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(bundle()).generate("the", max_new_tokens=4).tokens
    monkeypatch.setitem(sys.modules, "edgellm_kernels", installed)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = load(bundle(), kernels="own")
    assert model.session.kernels is None
    assert model.generate("the", max_new_tokens=4).tokens == expected
    (line,) = (text for text in caplog.messages if "edgellm-kernels" in text)  # once, however often
    assert "\n" not in line and line.endswith("; ONNX Runtime's kernels run instead")
    assert re.search(said, line)
    monkeypatch.setenv(VARIABLE, "own")
    (finding,) = (found for found in diagnose() if found.code == "EDGE018")
    assert finding.what == line and finding.remedy == f"unset {VARIABLE}"


def test_nothing_of_them_is_looked_at_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgellm_kernels", None)
    monkeypatch.setattr(own_kernels, "find", lambda ort: pytest.fail("they were looked for"))
    assert load(bundle()).session.kernels is None
    assert not [found for found in diagnose() if found.code == "EDGE018"]


def test_the_argument_goes_before_the_variable_and_other_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_kernels() == "onnxruntime"
    monkeypatch.setenv(VARIABLE, " own ")
    assert chosen_kernels() == "own" and chosen_kernels("onnxruntime") == "onnxruntime"
    monkeypatch.setenv(VARIABLE, "/tmp/theirs.so")
    for ask in (chosen_kernels, lambda: load(bundle())):
        with pytest.raises(OptionError, match=VARIABLE):
            ask()
    with pytest.raises(OptionError, match="kernels"):
        load(bundle(), kernels="theirs")


def test_no_bundle_may_name_the_operators() -> None:
    assert all((DOMAIN, op) not in operators for operators in TARGETS.values() for op in OPERATORS)


def test_a_graph_that_has_none_of_their_products_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(own_trial, "find", lambda ort: KERNELS)
    monkeypatch.setattr(OwnKernels, "swapped", lambda *given: (b"", ()))
    assert load(bundle(), kernels="own").session.kernels is None
    assert "has no product that edgellm-kernels computes; ONNX Runtime's kernels run instead" in caplog.text


@pytest.mark.parametrize(("op", "scheme"), [("ScatterND", Scheme(8, 32)), ("Mul", Scheme(8, ROW))], ids=str)
def test_a_node_that_lacks_an_input_is_told_in_one_sentence(op: str, scheme: Scheme) -> None:
    model = onnx.load_model_from_string(mixture_graph([scheme] * 2))
    branches = [a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute]
    for node in (node for graph in branches for node in graph.node if node.op_type == op):
        del node.input[1:]
    with pytest.raises(Unusable, match=r"^a node of the graph has other inputs than its operator$"):
        KERNELS.swapped(model.SerializeToString())


def test_of_a_graph_with_such_a_node_onnx_runtime_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bundle(), tmp_path / "b"))
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    (lost,) = node.output
    del node.output[:]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    sign(folder, "model.onnx")
    monkeypatch.setattr(own_trial, "find", lambda ort: KERNELS)
    with pytest.raises(BackendError, match=rf"refuses the graph: .*'{re.escape(lost)}' is not"):
        load(folder, kernels="own")
    assert "a node of the graph has other inputs than its operator; ONNX Runtime's kernels run instead" in caplog.text
