"""Which nodes of a graph become edgellm's own operators, and which stay as they are."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_graphs import LIBRARY, Chain, Matrix, layer
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.bundle import GRAPH
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.own_operators import DOMAIN, with_own_operators
from edgellm_runtime.graphs.rewriting import with_nodes
from edgellm_runtime.graphs.writer import Node, graph_bytes


def ops(model: bytes) -> list[str]:
    return [node["op_type"].decode() for node in read_model(model)["graph"]["node"]]


def product(**change: Any) -> bytes:
    """A graph of one product, with something other than usual about it."""
    given: dict[str, Any] = {"bits": 4, "block_size": 32, "N": 8, "K": 64, "accuracy_level": 4} | change
    dtypes = {name: given.pop(name, dtype) for name, dtype in (("w", np.uint8), ("s", np.float32), ("z", np.uint8))}
    inputs = given.pop("inputs", ["x", "w", "s", "z"])
    op = given.pop("op", "MatMulNBits")
    block, outputs = given["block_size"] or 32, given.pop("rows", 8)
    blocks = -(-64 // block)
    shapes = {"w": (outputs, blocks, block * given["bits"] // 8), "s": (outputs, blocks), "z": (outputs, 1)}
    tensors = {name: np.zeros(shapes[name], dtype) for name, dtype in dtypes.items() if dtype is not None}
    others = {name: "float32" for name in inputs if name and name not in tensors}
    return graph_bytes(
        [Node(op, inputs, ["y"], given, domain=LIBRARY, name="n")], others, {"y": "float32"}, tensors=tensors
    )


@pytest.mark.parametrize(
    "change", [{}, {"block_size": 128}, {"bits": 2}, {"bits": 8}, {"inputs": ["x", "w", "s"]}], ids=str
)
def test_products_that_they_compute_are_theirs(change: dict[str, Any]) -> None:
    graph, (node,) = with_own_operators(product(**change))
    sizes = {"N": 8, "K": 64, "bits": change.get("bits", 4), "block_size": change.get("block_size", 32)}
    inputs = change.get("inputs", ["x", "w", "s", "z"])
    more = {"sums": 0, "zeros": int("z" in inputs)}
    assert node == Node("BlockProduct", inputs, ["y"], sizes | more, domain=DOMAIN, name="n")
    (before,), (after,) = (read_model(data)["graph"]["node"] for data in (product(**change), graph))
    assert {key: after[key] for key in ("input", "output", "name")} == {
        key: before[key] for key in ("input", "output", "name")
    }
    assert {"domain": DOMAIN.encode(), "version": 1} in read_model(graph)["opset_import"]


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3}, {"block_size": 256}, {"accuracy_level": 0}, {"op": "GatherBlockQuantized"}, {"z": np.float32},
        {"s": np.float16}, {"w": None}, {"inputs": ["x", "w", "s", "z", "order"]},
        {"inputs": ["x", "w", "s", "", "", "bias"]}, {"rows": 16},
    ],
    ids=str,
)  # fmt: skip
def test_products_that_they_do_not_compute_stay_as_they_are(change: dict[str, Any]) -> None:
    assert with_own_operators(product(**change)) == (product(**change), ())


FIRST, LAST = Matrix(1, 128, 64, 32), Matrix(2, 40, 64, 32)


def test_a_layer_becomes_one_node() -> None:
    graph, (node,) = with_own_operators(layer(FIRST, LAST).model(64, "y", "total"))
    assert ops(graph) == ["NormGatedMlp"]
    assert list(node.inputs) == ["x", "skip", "normedgamma", "bothw", "boths", "", "yw", "ys"]
    assert list(node.outputs) == ["y", "total"]


def test_sums_of_blocks_and_rounded_rows_are_part_of_a_product() -> None:
    with_sums = layer(Matrix(1, 128, 66, 32, zeros=True), Matrix(2, 40, 66, 32, zeros=True), sums=True)
    graph, (node,) = with_own_operators(with_sums.model(64, "y", "total"))
    assert ops(graph) == ["NormGatedMlp"] and (node.attributes["sums"], node.attributes["sums_down"]) == (32, 32)
    rows = layer(Matrix(1, 128, 64, 0, bits=8), Matrix(2, 40, 64, 0, bits=8))
    graph, (node,) = with_own_operators(rows.model(64, "y", "total"))
    assert ops(graph) == ["NormGatedMlp"] and node.attributes["block_size_down"] == 0


def changed(change: Callable[[Chain], None]) -> Chain:
    """A layer's graph with something other than usual about it."""
    chain = layer(FIRST, LAST)
    change(chain)
    return chain


def replaced(op: str, /, **more: Any) -> Callable[[Chain], None]:
    """A change of the first node of an operator."""

    def change(chain: Chain) -> None:
        place = next(i for i, node in enumerate(chain.nodes) if node.op == op)
        node = chain.nodes[place]
        parts = {"op": op, "inputs": node.inputs, "outputs": node.outputs, "attributes": node.attributes} | more
        chain.nodes[place] = Node(**parts, domain=node.domain, name=node.name)

    return change


def wrong_halves(chain: Chain) -> None:
    chain.tensors["gatedsizes"] = np.array([32, 96], np.int64)


def another_reader(name: str) -> Callable[[Chain], None]:
    return lambda chain: chain.nodes.append(Node("Neg", [name], ["other"]))


def early_reader(chain: Chain) -> None:
    chain.nodes.insert(1, Node("Neg", ["total"], ["other"]))


@pytest.mark.parametrize(
    ("change", "own"),
    [
        (wrong_halves, ["NormProduct", "BlockProduct"]),
        (replaced("Sigmoid", op="Tanh"), ["NormProduct", "BlockProduct"]),
        (replaced("Split", attributes={"axis": 1}), ["NormProduct", "BlockProduct"]),
        (another_reader("gatedgate"), ["NormProduct", "BlockProduct"]),
        (another_reader("gatedup"), ["NormProduct", "BlockProduct"]),
        (another_reader("gated"), ["NormProduct", "BlockProduct"]),
        (another_reader("both"), ["NormProduct", "BlockProduct"]),
        (another_reader("normed"), ["GatedMlp"]),
        (early_reader, ["GatedMlp"]),
        (replaced("SkipSimplifiedLayerNormalization", outputs=["normed", "", "", ""]), ["GatedMlp"]),
        (replaced("SkipSimplifiedLayerNormalization", inputs=["x", "skip", "normedgamma", "x"]), ["GatedMlp"]),
        (another_reader("total"), ["NormGatedMlp"]),
    ],
)  # fmt: skip
def test_what_differs_in_one_point_is_left_out(change: Callable[[Chain], None], own: list[str]) -> None:
    model = changed(change).model(64, "y")
    graph, nodes = with_own_operators(model)
    assert [node.op for node in nodes] == own
    made = {name for node in read_model(graph)["graph"]["node"] for name in node["output"]}
    needed = {name for node in read_model(graph)["graph"]["node"] for name in node["input"] if name}
    given = {value["name"] for part in ("input", "initializer") for value in read_model(graph)["graph"][part]}
    assert needed <= made | given


@pytest.mark.parametrize(
    ("name", "own"),
    [("gated", ["NormProduct", "BlockProduct"]), ("normed", ["GatedMlp"]), ("total", ["NormGatedMlp"])],
)
def test_values_that_are_asked_for_stay(name: str, own: list[str]) -> None:
    model = layer(FIRST, LAST).model(64, "y")
    graph, nodes = with_own_operators(model, [name])
    assert [node.op for node in nodes] == own
    assert name.encode() in {made for node in read_model(graph)["graph"]["node"] for made in node["output"]}


ROWS = Matrix(3, 40, 64, 0, bits=8)


@pytest.mark.parametrize(
    "change",
    [
        replaced("ReduceMax", inputs=["skip", "yaxis"]), replaced("ReduceMin", inputs=["skip", "yaxis"]),
        replaced("QuantizeLinear", attributes={"axis": -1, "block_size": 32}),
        lambda chain: chain.tensors.update(ypart=np.array(1 / 126, np.float32)),
        lambda chain: chain.tensors.update(yone=np.array(2, np.float32)),
        lambda chain: chain.tensors.update(ymiddle=np.array(127, np.uint8)),
        lambda chain: chain.tensors.update(yaxis=np.array([1], np.int64)),
        replaced("ConstantOfShape", attributes={"value": np.array([127], np.uint8)}),
        another_reader("ywhole"),
    ],
)  # fmt: skip
def test_rows_that_are_rounded_otherwise_stay_as_they_are(change: Callable[[Chain], None]) -> None:
    chain = Chain()
    chain.product(ROWS, "x", "y")
    assert [node.op for node in with_own_operators(chain.model(64, "y"))[1]] == ["BlockProduct"]
    change(chain)
    model = chain.model(64, "y")
    assert with_own_operators(model) == (model, ())


def rounded_once(chain: Chain, *names: str) -> None:
    """Have two products of rounded rows share the nodes that round, as an exporter does."""
    first, second = names
    own = {f"{second}{part}" for part in ("most", "least", "negated", "top", "scale", "shape", "zero", "rounded")}
    shared = {name: name.replace(second, first, 1) for name in own}
    kept = [node for node in chain.nodes if node.outputs[0] not in own]
    chain.nodes[:] = [replace(node, inputs=[shared.get(name, name) for name in node.inputs]) for node in kept]


def test_two_products_of_one_norm_or_one_gate_read_what_it_gives() -> None:
    wide, narrow = Matrix(1, 128, 64, 0, bits=8), Matrix(2, 40, 64, 0, bits=8)
    chain = Chain()
    chain.norm("x", "skip", "normed", "total", 64)
    chain.product(narrow, "normed", "one")
    chain.product(narrow, "normed", "two")
    rounded_once(chain, "one", "two")
    graph, nodes = with_own_operators(chain.model(64, "one", "two", "total"))
    assert ops(graph) == ["SkipSimplifiedLayerNormalization", "BlockProduct", "BlockProduct"] and len(nodes) == 2
    chain = layer(wide, narrow)
    chain.product(narrow, "gated", "two")
    rounded_once(chain, "y", "two")
    graph, nodes = with_own_operators(chain.model(64, "y", "two"))
    assert [node.op for node in nodes] == ["NormProduct", "BlockProduct", "BlockProduct"]
    assert ops(graph) == ["NormProduct", "Split", "Sigmoid", "Mul", "Mul", "BlockProduct", "BlockProduct"]


@pytest.mark.parametrize("shape", [[0, 0, 4, 16], [0, 0, 1, 64], [1, 0, 2, 32]])
def test_sums_of_other_blocks_are_left_to_their_nodes(shape: list[int]) -> None:
    chain = Chain()
    chain.product(Matrix(3, 40, 66, 32), "x", "y", sums=32)
    chain.tensors["yshape"] = np.array(shape, np.int64)
    graph, (node,) = with_own_operators(chain.model(64, "y"))
    assert ops(graph) == ["Reshape", "ReduceSum", "Concat", "BlockProduct"] and node.attributes["sums"] == 0


@functools.cache
def bundle() -> bytes:
    folder = Path(tempfile.mkdtemp()) / "int4"
    export(attention_model(), folder, text=text_assets(), options=ExportOptions(target="cpu", quantize="int4"))
    return (folder / GRAPH).read_bytes()


def test_no_product_of_an_exported_graph_is_left_and_the_rest_keeps_its_bytes() -> None:
    assert with_nodes(bundle(), {}) == bundle()
    graph, nodes = with_own_operators(bundle())
    assert "MatMulNBits" not in ops(graph) and "NormGatedMlp" in [node.op for node in nodes]
    before, after = ({node["name"]: node for node in read_model(data)["graph"]["node"]} for data in (bundle(), graph))
    other = {name.decode() for name in after if after[name] != before[name]}
    assert other == {node.name for node in nodes}
    assert read_model(graph)["graph"]["initializer"] == read_model(bundle())["graph"]["initializer"]
