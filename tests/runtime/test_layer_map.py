"""Which layer each node of a graph is of, as its names tell."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tiny_bundles import attention_bundle, memory_bundle, recurrent_bundle, window_bundle

from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.layers import LAYER
from edgellm_runtime.graphs.layer_map import EMBEDDING, HEAD, SHARED, WHOLE, graph_nodes, layer_map
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import Node, graph_bytes


def _of(path, named: bool = True) -> tuple[list[str], list[str]]:  # type: ignore[no-untyped-def]
    bundle = Bundle(path)
    model = read_model(bundle.read(GRAPH))
    paths = bundle.manifest.layers if named else ()
    return layer_map(model, paths, LAYER if named else ""), [node.op for node in graph_nodes(model)]


@pytest.mark.parametrize("target", ["cpu", "onnx"])
@pytest.mark.parametrize(
    ("bundle", "layers"),
    [
        (attention_bundle, ["layers.0", "layers.1"]),
        (recurrent_bundle, ["blocks.0"]),
        (window_bundle, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_every_node_is_of_one_layer(bundle, layers: list[str], target: str) -> None:  # type: ignore[no-untyped-def]
    found, ops = _of(bundle(target))
    assert len(found) == len(ops)
    assert set(found) - {SHARED} == {EMBEDDING, *layers, HEAD}
    # the same is found in a graph whose layers nobody named, as those of older bundles are
    assert _of(bundle(target), named=False)[0] == found


def test_layers_of_one_kind_have_the_same_nodes() -> None:
    found, ops = _of(attention_bundle())
    inside = [Counter(op for op, at in zip(ops, found, strict=True) if at == f"layers.{n}") for n in (0, 1)]
    assert inside[0]["MatMul"] == inside[1]["MatMul"] == 4
    assert inside[0]["GroupQueryAttention"] == inside[1]["GroupQueryAttention"] == 1
    assert [at for op, at in zip(ops, found, strict=True) if op == "Gather"] == [EMBEDDING]


def test_a_model_without_a_list_of_layers_is_one_whole() -> None:
    assert set(_of(memory_bundle())[0]) == {WHOLE}


def _model(*nodes: Node, weights: tuple[str, ...], inputs: tuple[str, ...] = ("tokens",)) -> Message:
    tensors = {name: np.ones((2, 2), np.float32) for name in weights}
    return read_model(graph_bytes(nodes, dict.fromkeys(inputs, "int64"), {"logits": "float32"}, tensors=tensors))


def test_what_names_no_layer_goes_with_what_it_computes_from() -> None:
    model = _model(
        Node("Gather", ["embed.weight", "tokens"], ["x"]),
        Node("MatMul", ["x", "h.0.up.weight"], ["a"]),
        Node("Relu", ["a"], ["b"]),
        Node("Add", ["x", "b"], ["layer/h.0"]),
        Node("Exp", ["layer/h.0"], ["c"]),  # before the first weight of its layer, but after the other's end
        Node("MatMul", ["c", "h.1.up.weight"], ["d"]),
        Node("Add", ["layer/h.0", "d"], ["layer/h.1"]),
        Node("Exp", ["layer/h.1"], ["e"]),
        Node("MatMul", ["e", "embed.weight"], ["logits"]),
        weights=("embed.weight", "h.0.up.weight", "h.1.up.weight"),
    )
    ends = ["h.1", "h.1", "h.1", HEAD, HEAD]
    assert layer_map(model, ["h.0", "h.1"], LAYER) == [EMBEDDING, *["h.0"] * 3, *ends]
    # with no name of where layers end, a node before a layer's first weight goes with the layer before
    assert layer_map(model) == [EMBEDDING, *["h.0"] * 4, "h.1", "h.1", "h.1", HEAD]


def test_what_comes_from_no_token_goes_with_what_reads_it() -> None:
    model = _model(
        Node("Neg", ["past_lengths"], ["both"]),
        Node("Abs", ["past_lengths"], ["one"]),
        Node("Sqrt", ["logit_positions"], ["last"]),
        Node("Shape", ["tokens"], ["sizes"]),  # numbers of a tensor, but none of its tokens
        Node("Cast", ["sizes"], ["size"], {"to": 1}),
        Node("Gather", ["embed.weight", "tokens"], ["x"]),
        Node("Sum", ["x", "both", "one", "h.0.bias", "size"], ["y"]),
        Node("Sum", ["y", "both", "h.1.bias", "size"], ["z"]),
        Node("Sum", ["z", "last", "norm.weight"], ["logits"]),
        weights=("embed.weight", "h.0.bias", "h.1.bias", "norm.weight"),
        inputs=("tokens", "past_lengths", "logit_positions"),
    )
    assert layer_map(model) == [SHARED, "h.0", HEAD, SHARED, SHARED, EMBEDDING, "h.0", "h.1", HEAD]


def test_a_state_says_more_than_a_weight_that_layers_share() -> None:
    model = _model(
        Node("Gather", ["embed.weight", "tokens"], ["x"]),
        Node("Sum", ["x", "past.h.0.k", "h.0.table"], ["present.h.0.k"]),
        Node("Sum", ["present.h.0.k", "past.h.1.k", "h.0.table"], ["present.h.1.k"]),
        Node("Sum", ["present.h.1.k", "embed.weight"], ["logits"]),
        weights=("embed.weight", "h.0.table"),
    )
    assert layer_map(model) == [EMBEDDING, "h.0", "h.1", HEAD]


def test_a_table_that_only_the_last_layer_reads_does_not_make_it_the_head() -> None:
    model = _model(
        Node("Gather", ["embed.weight", "tokens"], ["x"]),
        Node("Sum", ["x", "h.0.bias"], ["y"]),
        Node("Sum", ["y", "h.1.bias"], ["z"]),
        Node("Mul", ["z", "rotary.cos"], ["turned"]),
        Node("Sum", ["turned", "past.h.1.k"], ["present.h.1.k"]),
        Node("Sum", ["turned", "norm.weight"], ["logits"]),
        weights=("embed.weight", "h.0.bias", "h.1.bias", "rotary.cos", "norm.weight"),
    )
    assert layer_map(model) == [EMBEDDING, "h.0", "h.1", "h.1", "h.1", HEAD]


def test_what_leads_to_a_layers_output_is_of_that_layer_whatever_its_weights_are_called() -> None:
    model = _model(
        Node("Gather", ["embed.weight", "tokens"], ["x"]),
        Node("Sum", ["x", "h.0.bias"], ["layer/h.0"]),
        Node("Sum", ["layer/h.0", "h.1.bias"], ["y"]),
        Node("Mul", ["y", "experts"], ["z"]),
        Node("Add", ["layer/h.0", "z"], ["layer/h.1"]),
        Node("Mul", ["layer/h.1", "norm.weight"], ["logits"]),
        weights=("embed.weight", "h.0.bias", "h.1.bias", "experts", "norm.weight"),
    )
    assert layer_map(model, ["h.0", "h.1"], LAYER) == [EMBEDDING, "h.0", "h.1", "h.1", "h.1", HEAD]
