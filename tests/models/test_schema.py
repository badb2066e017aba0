"""An op says once what it is: definitions that contradict themselves are refused, nodes are read by names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest
import torch

from edgellm.errors import OpError
from edgellm.ops import ATTENTION, LINEAR, LSTM, RMS_NORM, attention
from edgellm.ops.canonical import DOMAIN
from edgellm.ops.schema import OPS, REQUIRED, Op, find_op, view_of, views


@pytest.fixture(autouse=True)
def _ops_as_they_were() -> Iterator[None]:
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


def scaled(x: torch.Tensor, gain: torch.Tensor | None = None, *, by: float, twice: bool = False) -> torch.Tensor:
    y = x * by * (2 if twice else 1)
    return y if gain is None else y * gain


def other(x: torch.Tensor) -> torch.Tensor:
    return x


def op(**changes: Any) -> Op:
    return Op(
        **{
            "name": "Scaled", "inputs": ("x", "gain"), "outputs": ("y",),
            "attributes": {"by": REQUIRED, "twice": False}, "reference": scaled, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_a_reference_and_names_what_it_is_made_of(name: str) -> None:
    found = find_op(name)
    assert found.name == name
    assert found.reference.__doc__ or found.reference.__name__.startswith("_")
    assert all(matrix in found.inputs for matrix in found.matrices)


def test_an_op_without_a_reference_is_refused_with_the_file_that_defines_it() -> None:
    with pytest.raises(OpError, match=r"op Bare has no reference; give it reference=, .* in .*test_schema\.py"):
        Op(name="Bare", inputs=("x",), outputs=("y",))


def test_a_reference_that_is_no_function_written_in_python_is_refused() -> None:
    with pytest.raises(OpError, match=r"op Scaled: its reference is a builtin_function_or_method; give a function"):
        op(reference=torch.relu)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": ("x",)}, r"scaled takes \(x, gain, by, twice\), the op says \(x, by, twice\)"),
        ({"attributes": {"by": REQUIRED}}, r"takes \(x, gain, by, twice\), the op says \(x, gain, by\)"),
        ({"attributes": {"by": 1.0, "twice": False}}, "has default none for by, the op says 1.0"),
        ({"attributes": {"by": REQUIRED, "twice": True}}, "has default False for twice, the op says True"),
        ({"attributes": {"twice": False, "by": REQUIRED}}, r"the op says \(x, gain, twice, by\)"),
    ],
)
def test_a_schema_that_its_reference_contradicts_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OpError, match=rf"op Scaled and its reference disagree: .*{said}; correct .*test_schema\.py"):
        op(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outputs": ("x",)}, r"\['x'\] would mean two things"),
        ({"outputs": ("ignore",)}, r"\['ignore'\] would mean two things"),
        ({"matrices": ("w",)}, r"no input, output or matrix \['w'\]"),
        ({"products": {"gain": "x"}}, r"no input, output or matrix \['gain'\]"),
        ({"scaled_by": {"z": ("gain",)}}, r"no input, output or matrix \['z'\]"),
        ({"caches": {"x": "z"}}, r"no input, output or matrix \['z'\]"),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OpError, match=rf"op Scaled: .*{said}; correct the names in .*test_schema\.py"):
        op(**changes)


def test_two_ops_of_one_name_are_refused_and_one_that_is_defined_anew_is_not() -> None:
    first = op()
    again = op(outputs=("z",))
    assert find_op("Scaled") is again is not first
    with pytest.raises(OpError, match=r"op Scaled is defined in .* and again in .*; give one of them another name"):
        op(inputs=("x",), attributes={}, reference=other)


def test_calling_an_op_runs_its_reference() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = op()(x, torch.tensor([3.0, 4.0]), by=0.5, twice=True)
    torch.testing.assert_close(y.detach(), torch.tensor([3.0, 8.0]))
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3.0, 4.0]


def test_arguments_leave_out_what_is_the_default_and_refuse_what_is_unknown_or_missing() -> None:
    assert op().arguments(x=1, by=2) == ([1], {"by": 2.0})
    assert op().arguments(x=1, gain=5, by=2, twice=True) == ([1, 5], {"by": 2.0, "twice": True})
    assert ATTENTION.arguments(
        **dict.fromkeys(("q", "k", "v", "past_k", "past_v", "past_lengths", "lengths", "q_norm"), 0),
        num_heads=1, num_kv_heads=1, scale=1, epsilon=1e-6,
    ) == ([0, 0, 0, 0, 0, 0, 0, None, None, 0], {"num_heads": 1, "num_kv_heads": 1, "scale": 1.0})  # fmt: skip
    with pytest.raises(OpError, match="Scaled has no loudness; it takes x, gain, by, twice"):
        op().arguments(x=1, by=2, loudness=3)
    with pytest.raises(OpError, match="Scaled is captured without x, by; it takes"):
        op().arguments(gain=1)


class Calls(torch.nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.call(x)
        return y


def emitted(call: Any) -> torch.fx.Node:
    program = torch.export.export(Calls(call), (torch.zeros(2, 3),), strict=False)
    (node,) = [n for n in program.graph.nodes if "symbolic" in str(n.target)]
    return node


def test_captured_a_call_is_what_it_is_when_it_runs_however_its_values_are_given() -> None:
    one = op()
    calls = [lambda x: one(x, None, by=2), lambda x: one(x=x, by=2.0), lambda x: one(x, by=2, gain=None)]
    nodes = [emitted(call) for call in calls]
    assert {str(node.kwargs["attr_floats"]) for node in nodes} == {"[2.0]"}
    assert {len(node.args[0]) for node in nodes} == {1}
    by_place = op(reference=by_position, attributes={"by": 1.0}, name="ByPosition")
    assert emitted(lambda x: by_place(x, None, 3)).kwargs["attr_floats"] == [3.0]
    with pytest.raises(OpError, match="ByPosition is called with 4 values; it takes x, gain, by"):
        emitted(lambda x: by_place(x, None, 3, 4))
    with pytest.raises(OpError, match="the attribute by is a FakeTensor; attributes are numbers and texts"):
        emitted(lambda x: one(x, by=x.sum()))


def by_position(x: torch.Tensor, gain: torch.Tensor | None = None, by: float = 1.0) -> torch.Tensor:
    return x * by


def test_a_node_is_read_by_names_whatever_its_positions() -> None:
    x, weight = ir.Value(name="x"), ir.Value(name="w")
    node = LINEAR.node(ir.node, x=x, weight=weight)
    view = LINEAR.of(node)
    assert (view.x, view.weight, view.bias, view.y) == (x, weight, None, node.outputs[0])
    assert view.name_of(node.outputs[0]) == "y"
    norm = view_of(RMS_NORM.node(ir.node, x=view.y, weight=weight, epsilon=1e-5))
    assert norm is not None
    assert norm.op is RMS_NORM and norm.epsilon == pytest.approx(1e-5)
    assert [found.op.name for found in views([node, norm.node])] == ["Linear", "RMSNorm"]
    assert [found.node for found in views([node, norm.node], RMS_NORM)] == [norm.node]
    assert view_of(ir.node("Add", [x, x])) is None
    with pytest.raises(AttributeError, match="Linear has no gain; it has x, weight, bias"):
        _ = view.gain


def test_what_was_not_read_is_told_and_defaults_are_not() -> None:
    x, gain = ir.Value(name="x"), ir.Value(name="gain")
    view = op().of(op().node(ir.node, x=x, gain=gain, by=2, twice=True))
    assert view.unread() == [("x", x), ("gain", gain), ("by", 2.0), ("twice", True)]
    assert view.x is x and view.twice
    assert view.unread() == [("gain", gain), ("by", 2.0)]
    view.ignore("gain", "by")
    assert view.unread() == []
    plain = op().of(ir.node("Scaled", [x], domain=DOMAIN, attributes={"by": 2.0, "twice": False}))
    assert [name for name, _ in plain.unread()] == ["x", "by"]


def test_a_node_with_what_its_op_does_not_know_is_refused() -> None:
    x = ir.Value(name="x")
    with pytest.raises(OpError, match="node Linear has an attribute loudness that the op does not know; it takes x"):
        LINEAR.of(ir.node("Linear", [x, x], domain=DOMAIN, attributes={"loudness": 1}))
    with pytest.raises(OpError, match="node Linear has 2 more inputs that the op does not know"):
        LINEAR.of(ir.node("Linear", [x] * 5, domain=DOMAIN))
    with pytest.raises(OpError, match="no op Mystery is defined; import the module that defines it"):
        view_of(ir.node("Mystery", [x], domain=DOMAIN))
    with pytest.raises(OpError, match="a node RMSNorm has no epsilon, which every one must have"):
        _ = RMS_NORM.of(ir.node("RMSNorm", [x, x], domain=DOMAIN)).epsilon


def test_states_and_caches_name_what_they_become() -> None:
    assert dict(LSTM.states) == {"h": "present_h", "c": "present_c"}
    assert dict(ATTENTION.caches) == {"past_k": "present_k", "past_v": "present_v"}


def test_attention_captured_without_a_cache_is_refused() -> None:
    class Uncached(torch.nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return attention(x, x, x, None, None, n, n, None, None, num_heads=1, num_kv_heads=1, scale=1.0)[0]

    with pytest.raises(ValueError, match="captured without a cache: pass the state that state_specs"):
        torch.export.export(Uncached(), (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int32)), strict=False)
