"""Kernels of edgellm's own: who may choose them, what is put in which node's place, and what runs where they cannot."""

from __future__ import annotations

import functools
import logging
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import OptionError, load
from edgellm_runtime.backends import own_kernels
from edgellm_runtime.backends.own_kernels import DOMAIN, INTERFACE, OP, OwnKernels
from edgellm_runtime.bundle import GRAPH
from edgellm_runtime.checks.doctor import diagnose
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.operators import TARGETS
from edgellm_runtime.graphs.rewriting import with_operator
from edgellm_runtime.graphs.writer import Node, graph_bytes
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


def test_no_bundle_may_name_the_operator() -> None:
    assert all((DOMAIN, OP) not in operators for operators in TARGETS.values())


def product(**change: Any) -> bytes:
    """A graph of one product, with something other than usual about it."""
    given: dict[str, Any] = {"bits": 4, "block_size": 32, "N": 8, "K": 64, "accuracy_level": 4} | change
    dtypes = {name: given.pop(name, dtype) for name, dtype in (("w", np.uint8), ("s", np.float32), ("z", np.uint8))}
    inputs = given.pop("inputs", ["x", "w", "s", "z"])
    op = given.pop("op", "MatMulNBits")
    shapes = {"w": (8, 2, 16), "s": (8, 2), "z": (8, 1)}
    tensors = {name: np.zeros(shapes[name], dtype) for name, dtype in dtypes.items() if dtype is not None}
    others = {name: "float32" for name in inputs if name and name not in tensors}
    return graph_bytes(
        [Node(op, inputs, ["y"], given, domain="com.microsoft")], others, {"y": "float32"}, tensors=tensors
    )


@pytest.mark.parametrize("change", [{}, {"block_size": 128}, {"inputs": ["x", "w", "s"]}], ids=str)
def test_products_that_they_compute_are_theirs(change: dict[str, Any]) -> None:
    graph, count = KERNELS.swapped(product(**change))
    (before,), (after,) = (read_model(data)["graph"]["node"] for data in (product(**change), graph))
    assert count == 1
    assert after == before | {"op_type": OP.encode(), "domain": DOMAIN.encode()}
    assert {"domain": DOMAIN.encode(), "version": 1} in read_model(graph)["opset_import"]


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8}, {"block_size": 256}, {"accuracy_level": 0}, {"op": "GatherBlockQuantized"}, {"z": np.float32},
        {"s": np.float16}, {"w": None}, {"inputs": ["x", "w", "s", "z", "order"]},
        {"inputs": ["x", "w", "s", "", "", "bias"]},
    ],
    ids=str,
)  # fmt: skip
def test_products_that_they_do_not_compute_stay_as_they_are(change: dict[str, Any]) -> None:
    assert KERNELS.swapped(product(**change)) == (product(**change), 0)


def test_what_is_not_rewritten_keeps_its_bytes() -> None:
    graph = (bundle() / GRAPH).read_bytes()
    same, none = with_operator(graph, lambda node: False, domain="d", op="Op")
    assert (same, none) == (graph, 0)
    swapped, count = KERNELS.swapped(graph)
    assert count >= 5
    back, again = with_operator(
        swapped, lambda node: node["op_type"] == OP.encode(), domain="com.microsoft", op="MatMulNBits"
    )
    assert again == count

    def nodes(data: bytes) -> Any:
        return read_model(data)["graph"]

    assert nodes(back) == nodes(graph)
