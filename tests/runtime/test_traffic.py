"""Bytes and operations of kernels, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_runtime.checks.kernel_events import Kernel
from edgellm_runtime.checks.traffic import GraphTraffic, Step, Traffic
from edgellm_runtime.graphs.layer_map import graph_nodes
from edgellm_runtime.graphs.narrow_scales import POWERS
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.three_bits import CODES, PLACES, SHIFTS
from edgellm_runtime.graphs.writer import Node, graph_bytes
from edgellm_runtime.spec import StateSpec

_STEP = Step(past=10, time=3, capacity=64)
_CACHE = [StateSpec(f"layers.0.{n}", ("batch", 2, "capacity", 8), "float32", "append") for n in "kv"]
_CELL = StateSpec("layers.0.h", ("batch", 16), "float32", "replace")


def _traffic(
    nodes: list[Node], tensors: dict[str, np.ndarray], kernel: Kernel, *, run: set[int], place: int = 0, specs=()
) -> Traffic | None:  # type: ignore[no-untyped-def]
    model = read_model(graph_bytes(nodes, {"x": "float32"}, {"y": "float32"}, tensors=tensors))
    return GraphTraffic(model, graph_nodes(model), specs, run).of(kernel, place, _STEP)


def _kernel(op: str, given: list[tuple[int, ...]], made: list[tuple[int, ...]], **said: int) -> Kernel:
    return Kernel("n", op, 0, 0.0, 1.0, tuple(given), tuple(made), **said)


def test_of_a_mixture_of_experts_it_is_not_known_which_weights_are_read() -> None:
    weight = np.ones((4, 6), np.float32)
    for op in (EXPERTS, "GatedMlp"):
        kernel = _kernel(op, [(1, 3, 4)], [(1, 3, 6)], activation_bytes=48, output_bytes=72)
        found = _traffic([Node(op, ["x", "w"], ["y"], domain=DOMAIN)], {"w": weight}, kernel, run={0})
        assert (found is None) == (op == EXPERTS)


def test_a_product_reads_its_weights_once_and_counts_two_for_each() -> None:
    weight = np.ones((4, 6), np.float32)
    kernel = _kernel("MatMul", [(1, 3, 4)], [(1, 3, 6)], activation_bytes=3 * 4 * 4, output_bytes=3 * 6 * 4)
    found = _traffic([Node("MatMul", ["x", "w"], ["y"])], {"w": weight}, kernel, run={0})
    assert found == Traffic(weights=4 * 6 * 4, state=0, activations=3 * 4 * 4 + 3 * 6 * 4, operations=2 * 3 * 4 * 6)
    assert found.bytes == 96 + 48 + 72


@pytest.mark.parametrize("given", [[(1, 3, 4), (1, 4, 6)], [(1, 4, 3), (1, 4, 6)]])  # the left one as it is, and turned
def test_a_product_of_activations_sums_over_what_the_result_has_not(given: list[tuple[int, ...]]) -> None:
    kernel = _kernel("FusedMatMul", given, [(1, 3, 6)], activation_bytes=144, output_bytes=72)
    found = _traffic([Node("MatMul", ["x", "z"], ["y"])], {}, kernel, run={0})
    assert found == Traffic(0, 0, 216, 2 * 3 * 4 * 6)


def test_codes_in_4_bits_count_with_scales_as_they_are_when_the_graph_is_loaded() -> None:
    """The cast of the scales has no kernel: it was done once, and the product reads float32."""
    nodes = [
        Node("Cast", ["w.scales"], ["s"], {"to": 1}),
        Node("MatMulNBits", ["x", "w.codes", "s"], ["y"], {"K": 64, "N": 5, "bits": 4, "block_size": 32}),
    ]
    tensors = {"w.codes": np.zeros((5, 2, 16), np.uint8), "w.scales": np.ones((5, 2), np.float16)}
    kernel = _kernel("MatMulNBits", [(1, 1, 64), (5, 2)], [(1, 1, 5)], activation_bytes=256, output_bytes=20)
    found = _traffic(nodes, tensors, kernel, run={1}, place=1)
    assert found == Traffic(weights=5 * 32 + 5 * 2 * 4, state=0, activations=276, operations=2 * 64 * 5)


def test_scales_of_8_bits_count_as_the_floats_that_a_loaded_graph_has() -> None:
    nodes = [
        Node("Split", ["w.scales", "sizes"], ["power", "whole"], {"axis": 1}),
        Node("Cast", ["power"], ["index"], {"to": 6}), Node("Gather", ["powers", "index"], ["unit"]),
        Node("Cast", ["whole"], ["wide"], {"to": 1}), Node("Mul", ["wide", "unit"], ["s"]),
        Node("MatMulNBits", ["x", "w.codes", "s"], ["y"], {"K": 64, "N": 5, "bits": 4, "block_size": 32}),
    ]  # fmt: skip
    tensors = {
        "w.codes": np.zeros((5, 2, 16), np.uint8), "w.scales": np.zeros((5, 3), np.uint8), "sizes": np.array([1, 2]),
        "powers": np.array(POWERS, np.float32),
    }  # fmt: skip
    kernel = _kernel("MatMulNBits", [(1, 1, 64), (5, 2)], [(1, 1, 5)], activation_bytes=256, output_bytes=20)
    found = _traffic(nodes, tensors, kernel, run={5}, place=5)
    assert found == Traffic(weights=5 * 32 + 5 * 2 * 4, state=0, activations=276, operations=2 * 64 * 5)


def test_codes_of_3_bits_count_as_the_4_that_kernels_read() -> None:
    nodes = [
        Node("BitwiseAnd", ["w", "own"], ["first"]),
        Node("BitShift", ["w", "shifts"], ["moved"], {"direction": "RIGHT"}),
        Node("BitwiseAnd", ["moved", "places"], ["spare"]), Node("Split", ["spare"], ["a", "b", "c"], {"axis": 0}),
        Node("BitwiseOr", ["a", "b"], ["ab"]), Node("BitwiseOr", ["ab", "c"], ["last"]),
        Node("Concat", ["first", "last"], ["whole"], {"axis": 0}), Node("Reshape", ["whole", "shape"], ["codes"]),
        Node("MatMulNBits", ["x", "codes", "s"], ["y"], {"K": 64, "N": 6, "bits": 4, "block_size": 32}),
    ]  # fmt: skip
    tensors = {
        "w": np.zeros((3, 48), np.uint8), "own": np.array(CODES, np.uint8), "shape": np.array([6, 2, 16]),
        "shifts": np.array(SHIFTS, np.uint8)[:, None], "places": np.array(PLACES, np.uint8)[:, None],
        "s": np.ones((6, 2), np.float32),
    }  # fmt: skip
    kernel = _kernel("MatMulNBits", [(1, 1, 64)], [(1, 1, 6)], activation_bytes=256, output_bytes=24)
    found = _traffic(nodes, tensors, kernel, run={8}, place=8)
    assert found == Traffic(weights=6 * 32 + 6 * 2 * 4, state=0, activations=280, operations=2 * 64 * 6)


@pytest.mark.parametrize("before", [[], ["skip", "gamma"]])
def test_own_products_read_codes_of_3_bits_as_4_and_scales_of_8_as_16(before: list[str]) -> None:
    op = "NormProduct" if before else "BlockProduct"
    sizes = {"K": 64, "N": 6, "bits": 3, "block_size": 32, "scale_bits": 8}
    node = Node(op, ["x", *before, "w", "s", "z"], ["y"], sizes, domain=DOMAIN)
    tensors = {"w": np.zeros((3, 48), np.uint8), "s": np.zeros((6, 3), np.uint8), "z": np.zeros((6, 1), np.uint8)}
    tensors |= {name: np.ones(64, np.float32) for name in before[1:]}
    kernel = _kernel(op, [(1, 1, 64)], [(1, 1, 6)], activation_bytes=256, output_bytes=24)
    found = _traffic([node], tensors, kernel, run={0})
    assert found == Traffic(6 * 32 + 6 * 2 * 2 + 6 + 256 * len(before[1:]), 0, 280, operations=2 * 64 * 6)


def test_an_own_look_up_reads_the_rows_that_it_takes() -> None:
    node = Node(GATHER, ["x", "w", "s"], ["y"], {"N": 100, "K": 32, "bits": 3, "block_size": 32}, domain=DOMAIN)
    tensors = {"w": np.zeros((3, 400), np.uint8), "s": np.zeros((100, 1), np.float16)}
    kernel = _kernel(GATHER, [(1, 3)], [(1, 3, 32)], activation_bytes=24, output_bytes=384)
    assert _traffic([node], tensors, kernel, run={0}) == Traffic(3 * (12 + 2), 0, 408, operations=0)


def test_a_node_that_others_kernels_run_has_its_operations() -> None:
    node = Node("MatMulNBits", ["x", "w.codes"], ["y"], {"K": 64, "N": 5, "bits": 4, "block_size": 32})
    kernel = _kernel("SomebodysProduct", [(1, 1, 64)], [(1, 1, 5)], activation_bytes=256, output_bytes=20)
    found = _traffic([node], {"w.codes": np.zeros((5, 2, 16), np.uint8)}, kernel, run={0})
    assert found == Traffic(weights=160, state=0, activations=276, operations=2 * 64 * 5)


def test_an_embedding_reads_the_rows_that_it_takes() -> None:
    kernel = _kernel("Gather", [(100, 8), (1, 3)], [(1, 3, 8)], activation_bytes=24, output_bytes=96)
    found = _traffic([Node("Gather", ["w", "x"], ["y"])], {"w": np.ones((100, 8), np.float32)}, kernel, run={0})
    assert found == Traffic(weights=3 * 8 * 4, state=0, activations=120, operations=0)


@pytest.mark.parametrize(("window", "slots"), [(-1, 13), (5, 7)])
def test_attention_reads_the_slots_in_use_and_sees_what_came_before(window: int, slots: int) -> None:
    whole = 2 * 2 * 64 * 8 * 4  # what ONNX Runtime counts: all of the cache
    names = ["past.layers.0.k", "past.layers.0.v"]
    attention = Node(
        "GroupQueryAttention", ["x", "", "", *names, "n", "t", "cos", "sin"],
        ["y", "present.layers.0.k", "present.layers.0.v"], {"num_heads": 4, "local_window_size": window},
    )  # fmt: skip
    tables = {name: np.ones((50, 4), np.float32) for name in ("cos", "sin")}
    kernel = _kernel("GroupQueryAttention", [], [(1, 3, 32)], activation_bytes=whole + 100, output_bytes=whole + 384)
    found = _traffic([attention], tables, kernel, run={0}, specs=_CACHE)
    pairs = 11 + 12 + 13 if window < 0 else 3 * window
    assert found == Traffic(2 * 3 * 4 * 4, 2 * slots * 2 * 8 * 4, 484, 4 * 32 * pairs)


def test_a_recurrence_reads_and_writes_its_state() -> None:
    node = Node("RNN", ["x", "w", "r", "", "", "past.layers.0.h"], ["y", "present.layers.0.h"])
    tensors = {"w": np.ones((1, 16, 8), np.float32), "r": np.ones((1, 16, 16), np.float32)}
    kernel = _kernel("RNN", [(3, 1, 8)], [(3, 1, 1, 16)], activation_bytes=96 + 64, output_bytes=192 + 64)
    found = _traffic([node], tensors, kernel, run={0}, specs=[_CELL])
    assert found == Traffic(16 * 24 * 4, 2 * 64, 288, 2 * 3 * 16 * 24)


def test_a_kernel_for_several_nodes_reads_the_weights_of_all() -> None:
    nodes = [Node("MatMul", ["x", "w"], ["a"]), Node("Add", ["a", "b"], ["y"])]
    tensors = {"w": np.ones((4, 6), np.float32), "b": np.ones(6, np.float32)}
    kernel = _kernel("Gemm", [(3, 4)], [(3, 6)], activation_bytes=48, output_bytes=72)
    found = _traffic(nodes, tensors, kernel, run={0})
    assert found == Traffic(96 + 24, 0, 120, 2 * 3 * 4 * 6)


def test_what_is_not_known_is_not_made_up() -> None:
    kernel = _kernel("MatMul", [(1, 4)], [(1, 6)], activation_bytes=16, output_bytes=24)
    assert _traffic([Node("MatMul", ["x", "w"], ["y"])], {}, kernel, run={0}, place=None) is None  # of no node
    nodes = [Node("Expand", ["w", "sizes"], ["s"]), Node("MatMul", ["x", "s"], ["y"])]
    tensors = {"w": np.ones((1, 6), np.float32), "sizes": np.array([4, 6])}
    assert _traffic(nodes, tensors, kernel, run={1}, place=1) is None  # the size of a weight that was folded
    told = _kernel("MatMul", [(1, 4)], [(1, 6)], activation_bytes=16, output_bytes=24, parameter_bytes=96)
    found = _traffic(nodes, tensors, told, run={1}, place=1)
    assert found is not None
    assert found.weights == 96  # as ONNX Runtime tells it
    attention = _kernel("Attention", [(1, 4)], [(1, 4)], activation_bytes=16, output_bytes=16)
    found = _traffic([Node("Attention", ["x"], ["y"])], {}, attention, run={0})
    assert found == Traffic(0, 0, 32, None)


def test_sums_keep_what_is_not_known() -> None:
    assert Traffic(1, 2, 3, 4) + Traffic(10, 20, 30, 40) == Traffic(11, 22, 33, 44)
    assert (Traffic(1, 2, 3, 4) + Traffic(operations=None)).operations is None
    assert Traffic(2, 4, 6, None).part(2) == Traffic(1, 2, 3, None)
