"""Scales of 8 bits on edgellm's own kernels: which nodes they stand for, and the bits that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expert_graphs import mixture_graph
from numpy.typing import NDArray
from own_graphs import LIBRARY, Chain, bundle, opened, ops

from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.scales import in_bytes
from edgellm_runtime import load
from edgellm_runtime.backends.kernel_test import packed_codes
from edgellm_runtime.backends.own_gather_trial import GatherForm, gather_error
from edgellm_runtime.backends.own_trial import OWN_BOUND, OwnForm, ProductForm, form_of, own_error
from edgellm_runtime.bundle import GRAPH
from edgellm_runtime.graphs.narrow_scales import POWERS, random_scales, widened
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.graphs.writer import graph_bytes

Array = NDArray[Any]


@pytest.fixture(name="kernels")
def _kernels() -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")


built = pytest.mark.usefixtures("kernels")


def graph(rows: int, width: int, block: int, change: Callable[[Chain], None] = lambda chain: None) -> bytes:
    """A look-up in a table and a product with the same, as they are exported."""
    draw, blocks, chain = np.random.default_rng(rows), width // block, Chain()
    codes, points = (draw.integers(0, 16, (rows, n)).astype(np.uint8) for n in (width, blocks))
    chain.tensors = {
        "flat": packed_codes(codes, 4), "solid": packed_codes(codes, 4).reshape(rows, blocks, -1),
        "stored": random_scales(rows, blocks, draw), "sizes": np.array([1, blocks]),
        "table": np.array(POWERS, np.float32), "points": packed_codes(points, 4),
    }  # fmt: skip
    chain.add("Split", ["stored", "sizes"], "power", "numbers", axis=1)
    chain.add("Cast", ["power"], "index", to=6)
    chain.add("Gather", ["table", "index"], "units")
    chain.add("Cast", ["numbers"], "wide", to=1)
    chain.add("Mul", ["wide", "units"], "scales")
    change(chain)
    table = {"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    chain.add("GatherBlockQuantized", ["flat", "tokens", "scales", "points"], "x", domain=LIBRARY, **table)
    sizes = {"N": rows, "K": width, "bits": 4, "block_size": block, "accuracy_level": 4}
    chain.add("MatMulNBits", ["x", "solid", "scales", "points"], "y", domain=LIBRARY, **sizes)
    return graph_bytes(
        chain.nodes, {"tokens": "int64"}, {"x": "float32", "y": "float32"}, tensors=chain.tensors,
        shapes={"tokens": ["batch", "time"]},
    )  # fmt: skip


@pytest.mark.parametrize("method", ["4:32:asymmetric:scales8", "4:32:shifted:scales8"])
def test_operators_read_what_is_stored_and_nothing_of_widening_is_left(method: str) -> None:
    exported = (bundle(method) / GRAPH).read_bytes()
    swapped, nodes = with_own_operators(exported)
    assert {"MatMulNBits", "GatherBlockQuantized", "Split"} <= set(ops(exported))
    assert not {"MatMulNBits", "GatherBlockQuantized"} & set(ops(swapped))
    read = {name for node in read_model(swapped)["graph"]["node"] for name in node.get("input", ())}
    assert sum(name.endswith(b".scales") for name in read) >= 3
    multiplying = [node for node in nodes if "bits" in node.attributes]
    assert multiplying and all(node.attributes["scale_bits"] == 8 for node in multiplying)
    assert not any(b".scales" in name for node in read_model(swapped)["graph"]["node"] for name in node["input"]
                   if node["op_type"] in (b"Split", b"Cast"))  # fmt: skip


def test_the_branches_of_experts_read_it_too() -> None:
    swapped, (node,) = with_own_operators(mixture_graph([Scheme(4, 32, symmetric=False, scale_bits=8)] * 5))
    assert node.attributes["scale_bits"] == node.attributes["scale_bits_down"] == 8
    assert "If" not in ops(swapped) and "scale_bits=8" in repr(form_of(node))


def powers(chain: Chain) -> None:
    chain.tensors["table"] = np.array(POWERS[1:] + POWERS[:1], np.float32)


def turned(chain: Chain) -> None:
    chain.nodes[4].inputs[:] = ["wide", "wide"]  # type: ignore[index]


def column(chain: Chain) -> None:
    chain.tensors["table"] = np.array(POWERS, np.float32)[:, None]


@pytest.mark.parametrize("change", [powers, turned, column])
def test_other_scales_than_those_of_an_export_are_left_to_onnx_runtime(change: Callable[[Chain], None]) -> None:
    assert [node.op for node in with_own_operators(graph(8, 64, 32))[1]] == ["BlockProduct", "BlockGather"]
    assert not with_own_operators(graph(8, 64, 32, change))[1]


def test_bytes_are_read_as_they_were_written() -> None:
    stored = random_scales(5, 7, np.random.default_rng(0))
    stored[:, 1] = 255  # so that no coarser unit would do
    np.testing.assert_array_equal(in_bytes(widened(stored)), stored)


@built
@pytest.mark.parametrize(("rows", "width", "block"), [(8, 64, 32), (33, 48, 16), (70, 384, 128)])
def test_rows_and_products_are_those_of_onnx_runtime(rows: int, width: int, block: int) -> None:
    model = graph(rows, width, block)
    tokens = np.random.default_rng(1).integers(0, rows, (2, 9))
    ours, theirs = (opened(each).run(["x", "y"], {"tokens": tokens}) for each in (with_own_operators(model)[0], model))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5 * np.abs(theirs[1]).max())
    assert gather_error(GatherForm(4, block, zeros=True, scale_bits=8)) < 1e-6
    assert own_error(OwnForm("BlockProduct", (ProductForm(4, block, zeros=True, scale_bits=8),))) < OWN_BOUND


@built
def test_a_power_beyond_the_last_is_refused() -> None:
    def spoil(chain: Chain) -> None:
        chain.tensors["stored"][3, 0] = len(POWERS)

    with pytest.raises(Exception, match="power of two"):
        opened(with_own_operators(graph(8, 64, 32, spoil))[0])


@built
@pytest.mark.parametrize("method", ["4:32:asymmetric:scales8", "4:32:shifted:scales8"])
def test_a_bundle_gives_the_same_tokens_on_them(method: str) -> None:
    model = load(bundle(method), kernels="own")
    assert model.session.kernels is not None
    expected = load(bundle(method), kernels="onnxruntime").generate("the", max_new_tokens=8).tokens
    assert model.generate("the", max_new_tokens=8).tokens == expected
