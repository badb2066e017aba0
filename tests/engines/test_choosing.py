"""The graph that chooses tokens: what it says on ONNX Runtime's CPU kernels, and the engines that are built of it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime.graphs.token_choice import LOGITS, MOST, RESULTS, choosing_digest, choosing_graph

VOCAB = 120


@functools.cache
def session(vocab: int, count: int) -> Any:
    graph = choosing_graph("float32", vocab, count, sized=True)
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def chosen(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and values (batch, count), and sums (batch,)."""
    ids, values, total = session(logits.shape[1], count).run(list(RESULTS), {LOGITS: logits[:, None]})
    return ids[:, 0], values[:, 0], total[:, 0, 0]


def first_in_order(logits: np.ndarray, count: int) -> np.ndarray:
    """The likeliest first, of equals the lower id."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 40), batch=st.integers(1, 4))
def test_the_best_and_the_next_are_numpys_whatever_is_equal(seed: int, levels: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-levels, levels + 1, (batch, VOCAB)).astype(np.float32)  # ties are everywhere
    for count in (1, 64, VOCAB):
        ids, values, total = chosen(coarse, count)
        np.testing.assert_array_equal(ids, first_in_order(coarse, count))
        np.testing.assert_array_equal(values, np.take_along_axis(coarse, ids, axis=1))
        np.testing.assert_array_equal(total, coarse.sum(axis=1))
    np.testing.assert_array_equal(chosen(coarse, 1)[0][:, 0], coarse.argmax(axis=1))


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("at", [0, 5, VOCAB - 1])
def test_a_nan_anywhere_shows_in_its_rows_sum_only(count: int, at: int) -> None:
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    logits[0, 7], logits[1, at], logits[2, 3] = -np.inf, np.nan, -np.inf
    assert np.isnan(chosen(logits, count)[2]).tolist() == [False, True, False]


@pytest.mark.parametrize("count", [1, 64])
def test_zeros_of_either_sign_and_the_smallest_numbers_are_told_apart_as_numpy_does(count: int) -> None:
    logits = np.full((2, VOCAB), -1.0, dtype=np.float32)
    logits[0, [9, 4]] = 0.0, -0.0
    logits[1, [30, 60]] = np.float32(1e-44), 0.0  # denormal
    assert chosen(logits, count)[0][:, 0].tolist() == logits.argmax(axis=1).tolist() == [4, 30]


@pytest.mark.parametrize("count", [1, 64])
def test_the_graph_is_sound_and_states_its_sizes(count: int) -> None:
    model = onnx.load_from_string(choosing_graph("float32", VOCAB, count, sized=True))
    onnx.checker.check_model(model, full_check=True)
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sizes == {
        "logits": ["batch", 1, VOCAB], "ids": ["batch", 1, count], "values": ["batch", 1, count], "sum": ["batch", 1, 1]
    }  # fmt: skip


def test_a_graph_of_other_sizes_has_another_digest() -> None:
    digests = {choosing_digest(vocab, count) for vocab in (50, 51) for count in (1, 2, 50)}
    assert len(digests) == 6 and choosing_digest(50, 1) == choosing_digest(50, 1)


def built(vocab: int, count: int, folder: Path) -> tuple[Any, Any]:
    """What the parser made of the graph, and the shapes that its engine takes."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'edgellm[tensorrt]' builds engines without a GPU")
    from edgellm_exporters.engines.options import EngineOptions
    from edgellm_exporters.engines.parser_check import Facts
    from edgellm_exporters.engines.tensorrt import build_engine, find_library

    graph = folder / "choose.onnx"
    graph.write_bytes(choosing_graph("float32", vocab, count, sized=True))
    facts = Facts(RESULTS, {}, 0)
    profile = build_engine(
        find_library(), graph, folder / "engine", facts=facts, time=1, options=EngineOptions(max_batch=3),
        capabilities=["8.9"],
    )  # fmt: skip
    return facts, profile


@pytest.mark.parametrize(("vocab", "count"), [(292, 1), (292, 64), (49152, 1), (49152, 64), (MOST, MOST)])
def test_engines_are_built_of_it(vocab: int, count: int, tmp_path: Path) -> None:
    facts, profile = built(vocab, count, tmp_path)
    assert (profile[LOGITS].min, profile[LOGITS].max) == ((1, 1, vocab), (3, 1, vocab))
    assert (tmp_path / "engine").stat().st_size > 0
    assert ("TOPK" in facts.seen) == (count > 1), "the best one is found by no sort, whose order among equals is free"


def test_the_library_sorts_no_more_than_that(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=rf"K exceeds the maximum value allowed \({MOST}\)"):
        built(MOST + 1, MOST + 1, tmp_path)
