"""Codes of 3 bits on edgellm's own kernels: which nodes they stand for, and the bits that they give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from own_graphs import LIBRARY, Chain, bundle, opened, ops

from edgellm_runtime import load
from edgellm_runtime.backends import own_trial
from edgellm_runtime.backends.kernel_test import packed_codes
from edgellm_runtime.backends.own_gather_trial import GatherForm, gather_error
from edgellm_runtime.backends.own_kernels import OwnKernels
from edgellm_runtime.backends.own_trial import OWN_BOUND, OwnForm, ProductForm, own_error, usable_kernels
from edgellm_runtime.bundle import GRAPH
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.graphs.three_bits import PLACES, SHIFTS, condensed
from edgellm_runtime.graphs.writer import graph_bytes

Array = NDArray[Any]


@pytest.fixture(name="kernels")
def _kernels() -> None:
    """A library that takes 3 bits; one that was built before is refused as a whole where it is met."""
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")


built = pytest.mark.usefixtures("kernels")


def graph(rows: int, width: int, block: int, change: Callable[[Chain], None] = lambda chain: None) -> bytes:
    """A look-up in a table of 3-bit codes and a product with the same, as they are exported."""
    draw, blocks, chain = np.random.default_rng(rows), width // block, Chain()
    codes, points = (draw.integers(0, 8, (rows, n)).astype(np.uint8) for n in (width, blocks))
    chain.tensors = {
        "stored": condensed(packed_codes(codes, 4)), "own": np.array(0x77, np.uint8),
        "shifts": np.array(SHIFTS, np.uint8)[:, None], "places": np.array(PLACES, np.uint8)[:, None],
        "flat": np.array([rows, width // 2]), "solid": np.array([rows, blocks, block // 2]),
        "half": draw.uniform(-0.02, 0.02, (rows, blocks)).astype(np.float16), "points": packed_codes(points, 4),
    }  # fmt: skip
    chain.add("BitwiseAnd", ["stored", "own"], "first")
    chain.add("BitShift", ["stored", "shifts"], "shifted", direction="RIGHT")
    chain.add("BitwiseAnd", ["shifted", "places"], "spare")
    chain.add("Split", ["spare"], "a", "b", "c", axis=0, num_outputs=3)
    chain.add("BitwiseOr", ["a", "b"], "ab")
    chain.add("BitwiseOr", ["ab", "c"], "last")
    chain.add("Concat", ["first", "last"], "whole", axis=0)
    for shape in ("flat", "solid"):
        chain.add("Reshape", ["whole", shape], f"{shape} codes")
    chain.add("Cast", ["half"], "scales", to=1)
    change(chain)
    table = {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    chain.add("GatherBlockQuantized", ["flat codes", "tokens", "scales", "points"], "x", domain=LIBRARY, **table)
    sizes = {"N": rows, "K": width, "bits": 4, "block_size": block, "accuracy_level": 4}
    chain.add("MatMulNBits", ["x", "solid codes", "scales", "points"], "y", domain=LIBRARY, **sizes)
    return graph_bytes(
        chain.nodes, {"tokens": "int64"}, {"x": "float32", "y": "float32"}, tensors=chain.tensors,
        shapes={"tokens": ["batch", "time"]},
    )  # fmt: skip


def test_operators_read_what_is_stored_and_nothing_of_unpacking_is_left() -> None:
    exported = (bundle("3:32:asymmetric") / GRAPH).read_bytes()
    swapped, nodes = with_own_operators(exported)
    assert {"MatMulNBits", "BitShift", "BitwiseOr"} <= set(ops(exported))
    assert not {"MatMulNBits", "GatherBlockQuantized", "BitShift", "BitwiseAnd", "BitwiseOr"} & set(ops(swapped))
    for node in nodes:
        if "bits" in node.attributes:
            assert node.attributes["bits"] == 3
            assert any(name.endswith(".three_bits") for name in node.inputs)


def shifts(chain: Chain) -> None:
    chain.tensors["shifts"] = np.array([[3], [2], [2]], np.uint8)


def places(chain: Chain) -> None:
    chain.tensors["places"] = np.array([[0x11], [0x44], [0x22]], np.uint8)


def own(chain: Chain) -> None:
    chain.tensors["own"] = np.array(0x7F, np.uint8)


def left(chain: Chain) -> None:
    chain.nodes[1].attributes["direction"] = "LEFT"  # type: ignore[index]


def turned(chain: Chain) -> None:
    chain.nodes[6].inputs[:] = ["last", "first"]  # type: ignore[index]


def across(chain: Chain) -> None:
    chain.tensors["shifts"] = np.array([SHIFTS], np.uint8)


def wide(chain: Chain) -> None:
    chain.tensors["own"] = np.array(0x77, np.int64)


def whole(chain: Chain) -> None:
    chain.tensors["flat"] = chain.tensors["solid"] = np.array([-1])


@pytest.mark.parametrize("change", [shifts, places, own, left, turned, across, wide, whole])
def test_other_bits_than_those_of_an_export_are_left_to_onnx_runtime(change: Callable[[Chain], None]) -> None:
    assert [node.op for node in with_own_operators(graph(8, 64, 32))[1]] == ["BlockProduct", "BlockGather"]
    assert not with_own_operators(graph(8, 64, 32, change))[1]


@built
@pytest.mark.parametrize(("rows", "width", "block"), [(8, 64, 32), (33, 48, 16), (7, 128, 64), (70, 384, 128)])
def test_rows_and_products_are_those_of_onnx_runtime(rows: int, width: int, block: int) -> None:
    model = graph(rows, width, block)
    tokens = np.random.default_rng(1).integers(0, rows, (2, 9))
    ours, theirs = (opened(each).run(["x", "y"], {"tokens": tokens}) for each in (with_own_operators(model)[0], model))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5 * np.abs(theirs[1]).max())
    assert gather_error(GatherForm(3, block, zeros=True)) < 1e-6
    assert own_error(OwnForm("BlockProduct", (ProductForm(3, block, zeros=True),))) < OWN_BOUND


@built
def test_a_bundle_gives_the_same_tokens_on_them() -> None:
    model = load(bundle("3:32:asymmetric"), kernels="own")
    assert model.session.kernels is not None
    expected = load(bundle("3:32:asymmetric"), kernels="onnxruntime").generate("the", max_new_tokens=8).tokens
    assert model.generate("the", max_new_tokens=8).tokens == expected


def test_an_older_library_is_told_and_onnx_runtime_computes(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(form: Any) -> float:
        raise RuntimeError("has codes of 2, 4 and 8 bits")

    monkeypatch.setattr(own_trial, "find", lambda ort: OwnKernels(Path("nowhere"), "none", "of another build"))
    monkeypatch.setattr(own_trial, "own_error", refuse)
    own_trial._known_error.cache_clear()
    assert usable_kernels(bundle("3:32:asymmetric") / GRAPH, "own") is None
    assert "does not take" in caplog.text and "install those of this release" in caplog.text
