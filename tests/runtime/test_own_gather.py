"""Rows of a table of codes by edgellm's own operator, and the memory of files that own operators have read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from own_graphs import LIBRARY, Chain, Matrix, codes_of, opened

from edgellm_runtime.backends.kernel_test import packed_codes
from edgellm_runtime.backends.own_gather_trial import GatherForm, gather_error
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.graphs.writer import Node, graph_bytes

Array = NDArray[Any]
built = pytest.mark.usefixtures("kernels")


@pytest.fixture(name="kernels")
def _kernels() -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")


def graph(
    rows: int, width: int, block: int, bits: int, *, zeros: bool = False, cast: bool = True, seed: int = 1,
    change: dict[str, int] | None = None,
) -> bytes:  # fmt: skip
    """A look-up, and a product, without which nothing is put in its place."""
    draw, blocks = np.random.default_rng(seed), -(-width // block)
    codes = draw.integers(0, 1 << bits, (rows, width)).astype(np.uint8)
    scales = draw.uniform(-0.02, 0.02, (rows, blocks)).astype(np.float16)
    chain = Chain()
    chain.product(Matrix(2, 8, width, 32), "rows", "y")
    chain.tensors |= {"codes": packed_codes(codes, bits)}
    inputs = ["codes", "tokens", "scales"]
    if zeros:
        chain.tensors["points"] = packed_codes(draw.integers(0, 1 << bits, (rows, blocks)).astype(np.uint8), bits)
        inputs.append("points")
    nodes = [Node("Cast", ["half"], ["scales"], {"to": 1})] if cast else []
    chain.tensors["half" if cast else "scales"] = scales if cast else scales.astype(np.float32)
    sizes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1} | (change or {})
    nodes += [Node("GatherBlockQuantized", inputs, ["rows"], sizes, domain=LIBRARY), *chain.nodes]
    return graph_bytes(
        nodes, {"tokens": "int64"}, {"rows": "float32", "y": "float32"}, tensors=chain.tensors,
        shapes={"tokens": ["batch", "time"]},
    )  # fmt: skip


def test_a_look_up_reads_the_table_and_its_scales_as_they_are() -> None:
    _, nodes = with_own_operators(graph(9, 64, 32, 4, zeros=True))
    (node,) = (node for node in nodes if node.op == GATHER)
    assert (list(node.inputs), list(node.outputs)) == (["tokens", "codes", "half", "points"], ["rows"])
    assert node.attributes == {"N": 9, "K": 64, "bits": 4, "block_size": 32, "zeros": 1}


@pytest.mark.parametrize("change", [{"gather_axis": 1}, {"quantize_axis": 0}, {"bits": 3}, {"block_size": 8}], ids=str)
def test_other_look_ups_stay_as_they_are(change: dict[str, int]) -> None:
    _, nodes = with_own_operators(graph(9, 64, 32, 4, change=change))
    assert [node.op for node in nodes] == ["BlockProduct"]


@built
@pytest.mark.parametrize("cast", [True, False], ids=["float16 scales", "float32 scales"])
@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 64), (8, 32), (8, 128)])
def test_rows_have_the_bits_of_onnx_runtimes(bits: int, block: int, zeros: bool, cast: bool) -> None:
    model = graph(50, 160, block, bits, zeros=zeros, cast=cast)
    places = np.random.default_rng(3).integers(-50, 50, (3, 30))
    ours, theirs = (opened(each).run(["rows"], {"tokens": places})[0] for each in (with_own_operators(model)[0], model))
    np.testing.assert_array_equal(ours, theirs)
    assert gather_error(GatherForm(bits, block, zeros)) < 1e-6


@built
@pytest.mark.parametrize("place", [50, -51, 1 << 62])
def test_a_place_outside_of_the_table_is_refused(place: int) -> None:
    session = opened(with_own_operators(graph(50, 64, 32, 8))[0])
    with pytest.raises(Exception, match=rf"has 50 rows, none at {place}"):
        session.run(None, {"tokens": np.array([[1, place]])})


def in_memory(file: Path) -> int:
    """Bytes of a file that this process has in its memory."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@built
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are in memory")
def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    rows, width = 16000, 512
    data = tmp_path / "weights"
    model = onnx.load_model_from_string(with_own_operators(graph(rows, width, 32, 8))[0])
    product = Matrix(5, 8192, width, 32, bits=8, zeros=True)  # 4 MB of codes, half of it scales and zeros
    for tensor in model.graph.initializer:
        if tensor.name in ("yw", "ys"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(product.tensors("y")[tensor.name], tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "BlockProduct" and attribute.name in ("N", "bits"):
                attribute.i = {"N": 8192, "bits": 8}[attribute.name]
    onnx.save_model(
        model, tmp_path / "model.onnx", save_as_external_data=True, location=data.name, size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    assert data.stat().st_size > 12 << 20
    session = opened(str(tmp_path / "model.onnx"))
    assert in_memory(data) < 1 << 20  # before, its matrix was read as a whole
    places = np.arange(rows)[None]
    first, _ = session.run(None, {"tokens": places})
    assert in_memory(data) < 3 << 20  # of the table's 8 MB and its scales
    again, _ = session.run(None, {"tokens": places})
    np.testing.assert_array_equal(again, first)
    table = {tensor.name: onnx.numpy_helper.to_array(tensor, str(tmp_path)) for tensor in model.graph.initializer}
    scales = np.repeat(table["half"].astype(np.float32), 32, 1)
    np.testing.assert_array_equal(first[0], (codes_of(table["codes"], 8) - 128).astype(np.float32) * scales)
