"""Capped scores on ONNX Runtime's CPU: a kernel for few of them, written out for many, one cache for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import CONTEXT, VOCAB, make, planned

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import find_target
from edgellm_runtime import open_session
from edgellm_runtime.session import Session

FAMILY = "windows and soft caps"  # a window of 9, then none


@pytest.fixture(scope="module", params=["", "int8"], ids=["float cache", "8-bit cache"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    options = ExportOptions(target="cpu", kv_cache=request.param) if request.param else ExportOptions(target="cpu")
    bundle = export(make(FAMILY), tmp_path_factory.mktemp("capped") / "b", options=options).bundle
    return open_session(bundle, threads=1)


def read(session: Session, row: np.ndarray, sizes: list[int]) -> np.ndarray:
    state, start, found = session.new_state(1, CONTEXT), 0, []
    for size in sizes:
        found.append(session.step(row[:, start : start + size], state, logits="all")[0].copy())
        start += size
    return np.concatenate(found)


@torch.no_grad()
def test_any_pieces_give_what_pytorch_gives(session: Session) -> None:
    row = np.random.default_rng(0).integers(0, VOCAB, (1, 60))
    expected = make(FAMILY)(torch.from_numpy(row))[0][0].numpy()
    narrow = any(spec.dtype == "int8" for spec in session.signature.state)
    close = (0.05 if narrow else 1e-5) * np.abs(expected).max()
    for sizes in ([60], [1] * 60, [20, 1, 13, 1, 1, 24], [2, 58], [59, 1]):
        assert np.abs(read(session, row, sizes) - expected).max() < close


def test_pieces_of_one_token_and_of_several_write_one_cache(session: Session) -> None:
    row = np.random.default_rng(1).integers(0, VOCAB, (1, 30))
    states = [session.new_state(1, 30) for _ in range(2)]
    for at in range(30):
        session.step(row[:, at : at + 1], states[0])
    session.step(row, states[1])
    for spec in session.signature.state:
        one, several = (state.read(spec.name)[:, :, :30].astype(np.float64) for state in states)
        assert np.abs(one - several).max() <= (1 if spec.dtype == "int8" else 1e-5), spec.name  # a code on an edge


@torch.no_grad()
def test_rows_of_unequal_length_see_their_own_windows(session: Session) -> None:
    if any(spec.dtype == "int8" for spec in session.signature.state):
        pytest.skip("the same graph but for the cache")
    model, rows, lengths = make(FAMILY), np.random.default_rng(2).integers(0, VOCAB, (2, 25)), np.array([25, 3])
    state = session.new_state(2, CONTEXT)
    session.step(rows[:, :25], state, lengths=lengths)
    for at in (0, 1):  # one token a row, of rows with windows of 9 that begin at 17 and at 0
        found = session.step(rows[:, at : at + 1], state)
        for row, n in enumerate(lengths):
            tokens = np.concatenate([rows[row, :n], rows[row, : at + 1]])
            expected = model(torch.from_numpy(tokens[None]))[0][0, -1].numpy()
            assert np.abs(found[row, -1] - expected).max() < 1e-5 * np.abs(expected).max()


def test_few_scores_take_the_kernel_alone() -> None:
    graph, plan = planned(make(FAMILY), "cpu", "none")
    lowered = lower_to(graph, find_target("cpu"), plan)
    outer = [node.op_type for node in lowered.graph]
    assert "GroupQueryAttention" not in outer
    branches = [
        {a.name: list(a.as_graph()) for a in node.attributes.values()} for node in lowered.graph if node.op_type == "If"
    ]
    layers = [b for b in branches if any(n.op_type == "GroupQueryAttention" for n in b["then_branch"])]
    assert [len(b["then_branch"]) for b in layers] == [1, 1]
    kernels: list[ir.Node] = [b["then_branch"][0] for b in layers]
    assert [k.attributes["softcap"].as_float() for k in kernels] == [5.0, 5.0]
    assert ["local_window_size" in k.attributes for k in kernels] == [True, False]
    assert all(kernel.inputs[1] is None for kernel in kernels)  # queries, keys and values go in as one
    for branch in layers:
        kinds = {n.op_type for n in branch["else_branch"]}
        assert {"ScatterND", "Tanh", "Softmax"} <= kinds and "GroupQueryAttention" not in kinds


def test_without_a_cap_the_kernel_is_all_there_is(tmp_path: Path) -> None:
    graph, plan = planned(make("windows without caps"), "cpu", "none")
    kinds = [node.op_type for node in lower_to(graph, find_target("cpu"), plan).graph]
    assert kinds.count("GroupQueryAttention") == 2 and "If" not in kinds
