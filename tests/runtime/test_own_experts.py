"""A mixture of experts as one operator: which branches it stands for, and the bits that it gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from expert_graphs import WIDTH, mixture_graph, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from own_graphs import opened

from edgellm_exporters.quantize.plan import ROW, Scheme
from edgellm_runtime.backends.own_experts_trial import ExpertsForm, experts_error
from edgellm_runtime.backends.own_product_trial import ProductForm
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.own_operators import DOMAIN, with_own_operators

Array = NDArray[Any]
SCHEMES = {
    "int4": Scheme(4, 32), "4:64:asymmetric": Scheme(4, 64, symmetric=False), "int8": Scheme(8, 32),
    "w8a8": Scheme(8, ROW), "shifted": Scheme(4, 32, symmetric=False, shifted=True),
    "3:64:asymmetric": Scheme(3, 64, symmetric=False),
    "3:64:asymmetric:scales8": Scheme(3, 64, symmetric=False, scale_bits=8),
}  # fmt: skip
built = pytest.mark.usefixtures("kernels")


@pytest.fixture(name="kernels")
def _kernels() -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")


@pytest.mark.parametrize("kind", SCHEMES)
def test_experts_of_one_format_become_one_node_and_nothing_of_theirs_stays(kind: str) -> None:
    swapped, (node,) = with_own_operators(mixture_graph([SCHEMES[kind]] * 5))
    assert (node.op, node.domain, list(node.inputs[:3]), list(node.outputs)) == (
        EXPERTS, DOMAIN, ["total", "x", "shares"], ["sum.4"],
    )  # fmt: skip
    assert (node.attributes["first"], node.attributes["experts"]) == (0, 5)
    left = Counter(each.op_type for each in onnx.load_model_from_string(swapped).graph.node)
    assert left.keys() <= {EXPERTS, "Cast", "Squeeze"} and left["Cast"] == left["Squeeze"]  # of scales of rows


def test_experts_of_other_formats_are_nodes_of_their_own_and_float_ones_stay_as_they_are() -> None:
    four, eight = SCHEMES["int4"], SCHEMES["int8"]
    model = mixture_graph([four, four, eight, None, eight, four])
    swapped, nodes = with_own_operators(model)
    assert [(n.attributes["first"], n.attributes["experts"], n.attributes["bits"]) for n in nodes] == [
        (0, 2, 4), (2, 1, 8), (4, 1, 8), (5, 1, 4)
    ]  # fmt: skip
    assert [n.op_type for n in onnx.load_model_from_string(swapped).graph.node].count("If") == 1


@pytest.mark.parametrize("form", [{"limit": 7.0}, {"offset": 1.0}, {"slope": 1.5}, {"activation": "gelu"}], ids=str)
def test_experts_with_another_gate_stay_as_they_are(form: dict[str, Any]) -> None:
    model = mixture_graph([SCHEMES["int4"]] * 2, form=form)
    assert with_own_operators(model) == (model, ())


def altered(change: str) -> bytes:
    """A graph whose branches do not mean what an expert's do."""
    model = onnx.load_model_from_string(mixture_graph([SCHEMES["int4"]] * 2))
    nodes = list(model.graph.node)
    first = next(node for node in nodes if node.op_type == "If")
    then, other = (attribute.g for attribute in sorted(first.attribute, key=lambda a: a.name != "then_branch"))
    asked = next(node for node in nodes if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.BOOL)
    if change == "another sum is kept":
        other.node[0].input[0] = "x"
    elif change == "replaces":
        next(n for n in then.node if n.op_type == "ScatterND").attribute[0].s = b"none"
    elif change == "another's flag":
        first.input[0] = next(node for node in nodes if asked.output[0] in node.input).output[1]
    elif change == "no reduction of shares":
        next(n for n in nodes if asked.input[0] in n.output).input[0] = "x"
    elif change == "weighted by another":
        gathers = [n for n in then.node if n.op_type == "GatherND"]
        gathers[1].input[0] = next(n for n in nodes if "shares" in n.input and n.op_type == "Split").output[1]
    elif change == "a larger branch":
        then.node.append(onnx.helper.make_node("Identity", [then.output[0].name], ["more"]))
        then.output[0].name = "more"
    elif change == "reads what it makes itself":
        for gather in (n for n in then.node if n.op_type == "GatherND" and n.input[0] == "x"):
            gather.input[0] = "inside"
        then.node.insert(0, onnx.helper.make_node("Identity", ["x"], ["inside"]))
    elif change == "adds to what it makes itself":
        next(n for n in then.node if n.op_type == "ScatterND").input[0] = "inside"
        then.node.insert(0, onnx.helper.make_node("Identity", ["total"], ["inside"]))
    return bytes(model.SerializeToString())


CHANGES = (
    "another sum is kept", "replaces", "another's flag", "no reduction of shares", "weighted by another",
    "a larger branch", "reads what it makes itself", "adds to what it makes itself",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_branch_that_means_something_else_stays(change: str) -> None:
    _, nodes = with_own_operators(altered(change))
    assert [node.attributes["first"] for node in nodes] == ([] if change == "no reduction of shares" else [1])


@built
@pytest.mark.parametrize("kind", SCHEMES)
def test_sums_are_those_of_the_branches(kind: str) -> None:
    model = mixture_graph([SCHEMES[kind]] * 6)
    ours, theirs = opened(with_own_operators(model)[0]), opened(model, own=False)
    for batch, time in ((1, 1), (8, 1), (2, 37)):
        feeds = tokens(batch, time, 6, 2)
        (a,), (b,) = ours.run(None, feeds), theirs.run(None, feeds)
        assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b)  # a code of 127 may be the next one
        assert np.abs(b - feeds["total"]).max() > 0.1


def one_by_one(model: bytes, feeds: dict[str, Array]) -> Array:
    """Expert after expert, each MLP by the operator for one, of all tokens."""
    _, (node,) = with_own_operators(model)
    proto = onnx.load_model_from_string(with_own_operators(model)[0])
    shared = {n: a for n, a in node.attributes.items() if n not in ("first", "experts")}
    constants, count = list(node.inputs[3:]), feeds["shares"].shape[-1]
    total = feeds["total"]
    for i in range(count):
        own = constants[i * len(constants) // count : (i + 1) * len(constants) // count]
        if not shared["zeros"]:
            own = [*own[:2], "", *own[2:]]
        graph = onnx.GraphProto()
        graph.CopyFrom(proto.graph)
        del graph.node[:], graph.output[:]
        graph.node.extend(n for n in proto.graph.node if n.op_type != EXPERTS)
        graph.node.append(onnx.helper.make_node("GatedMlp", ["x", *own], ["y"], domain=DOMAIN, **shared))
        graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
        whole = onnx.ModelProto()
        whole.CopyFrom(proto)
        whole.graph.CopyFrom(graph)
        (y,) = opened(whole.SerializeToString()).run(None, feeds)
        share = feeds["shares"][..., i, None]
        total = np.where(share != 0, total + y * share, total)
    return total


@built
@pytest.mark.parametrize("kind", SCHEMES)
def test_every_expert_gives_the_bits_that_it_gives_alone(kind: str) -> None:
    model, feeds = mixture_graph([SCHEMES[kind]] * 4), tokens(3, 13, 4, 2)
    feeds["shares"][1] = 0  # tokens that have none
    expected = one_by_one(model, feeds)
    for threads in (1, 2):
        (found,) = opened(with_own_operators(model)[0], threads).run(None, feeds)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(expected[1], feeds["total"][1])


@built
def test_a_token_depends_on_no_neighbour_whatever_a_step_holds() -> None:
    session = opened(with_own_operators(mixture_graph([SCHEMES["int4"]] * 6))[0])
    feeds = tokens(1, 700, 6, 3)  # more pairs than are computed at a time
    (whole,) = session.run(None, feeds)

    @settings(deadline=None, max_examples=30)
    @given(start=st.integers(0, 699), count=st.integers(1, 40))
    def some(start: int, count: int) -> None:
        part = {name: value[:, start : start + count] for name, value in feeds.items()}
        np.testing.assert_array_equal(session.run(None, part)[0], whole[:, start : start + count])

    some()


@built
def test_a_share_that_is_no_number_reaches_its_token_alone() -> None:
    session = opened(with_own_operators(mixture_graph([SCHEMES["int4"]] * 3))[0])
    feeds = tokens(1, 4, 3, 1)
    (clean,) = session.run(None, feeds)
    feeds["shares"][0, 2, 0] = np.nan
    (found,) = session.run(None, feeds)
    assert np.isnan(found[0, 2]).all()
    np.testing.assert_array_equal(found[0, [0, 1, 3]], clean[0, [0, 1, 3]])


@built
@pytest.mark.parametrize(
    ("name", "shape"), [("x", (1, 2, 64)), ("total", (1, 2, 64)), ("shares", (1, 2, 2)), ("x", (1, 3, WIDTH))]
)
def test_inputs_of_other_sizes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    graph = onnx.load_model_from_string(with_own_operators(mixture_graph([SCHEMES["int4"]] * 3))[0])
    for value in graph.graph.input:
        value.type.tensor_type.ClearField("shape")
    session = opened(graph.SerializeToString())
    with pytest.raises(Exception, match="takes "):
        session.run(None, tokens(1, 2, 3, 1) | {name: np.zeros(shape, np.float32)})


@built
@pytest.mark.parametrize(("bits", "block", "last"), [(8, 0, 8), (4, 64, 8), (2, 16, 2), (2, 32, 2)])
def test_the_trial_on_this_processor_tells_a_right_library_from_a_wrong_one(
    bits: int, block: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = ExpertsForm(ProductForm(bits, block, zeros=block > 0), ProductForm(last, block))
    assert experts_error(form) < 1e-3
    monkeypatch.setattr("edgellm_runtime.backends.own_experts_trial.gated", lambda x: x[:, : x.shape[1] // 2])
    assert experts_error(form) > 0.1
