"""Every op on every target: what a rule is given it computes as the reference does, or it is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from edgellm.ops.schema import OPS, REQUIRED, Op
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.references import expand_references
from edgellm_exporters.graph.targets import TARGETS, Target
from edgellm_exporters.lowering.context import Lowering, lower
from edgellm_exporters.lowering.fixed_form import DECODE, PREFILL, Form
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.plan import Plan

BATCH, PAST, CAPACITY = 2, 6, 12
HEADS, KV_HEADS, DIM, FEATURES, HIDDEN, SOURCE = 4, 2, 16, 32, 24, 7
WEIGHTS = {"weight", "bias", "q_norm", "k_norm", "sinks", "cos", "sin", "w_ih", "w_hh", "b_ih", "b_hh"}
WEIGHTS |= {"up", "down", "gate", "up_bias", "down_bias", "gate_bias"}


def numbers(*shape: int, mean: float = 0.0) -> Tensor:
    return torch.randn(shape) + mean


def recurrent(gates: int, time: int, **more: Any) -> dict[str, Any]:
    shapes = {"w_ih": (gates * HIDDEN, FEATURES), "w_hh": (gates * HIDDEN, HIDDEN)}
    return {
        "x": numbers(BATCH, time, FEATURES), "h": numbers(BATCH, HIDDEN),
        **{name: numbers(*shape) / 5 for name, shape in shapes.items()},
        **{name: numbers(gates * HIDDEN) for name in ("b_ih", "b_hh")}, "lengths": lengths(time), **more,
    }  # fmt: skip


def lengths(time: int) -> Tensor:
    return torch.tensor([time, max(time - 2, 1)], dtype=torch.int32)


def attending(time: int) -> dict[str, Any]:
    kv, cache = KV_HEADS * DIM, (BATCH, KV_HEADS, CAPACITY, DIM)
    past = 0 if time > 1 else PAST  # one token over a cache that is filled, or several over an empty one
    filled = torch.arange(CAPACITY)[:, None] < past
    return {
        "q": numbers(BATCH, time, HEADS * DIM) * 2, "k": numbers(BATCH, time, kv) * 2, "v": numbers(BATCH, time, kv),
        "past_k": numbers(*cache) * filled, "past_v": numbers(*cache) * filled,
        "past_lengths": torch.full((BATCH,), past, dtype=torch.int32), "lengths": lengths(time),
        "num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": 0.3,
    }  # fmt: skip


def around(time: int) -> dict[str, Any]:
    """A ring that the tokens before have filled, or that holds nothing yet."""
    ring, past = (BATCH, KV_HEADS, 5, DIM), PAST if time == 1 else 2
    there = (torch.arange(5)[:, None] < past).float()
    return {
        **attending(time), "past_k": numbers(*ring) * there, "past_v": numbers(*ring) * there,
        "past_lengths": torch.full((BATCH,), past, dtype=torch.int32), "window": 4,
    }  # fmt: skip


def looking(time: int) -> dict[str, Any]:
    """Any tokens over sources of which one has padding."""
    k, v = (numbers(BATCH, KV_HEADS, SOURCE, DIM) for _ in range(2))
    mask = torch.arange(SOURCE) < torch.tensor([[SOURCE], [4]])
    return {"q": numbers(BATCH, HEADS, time, DIM), "k": k, "v": v, "mask": mask, "scale": 0.3}


def fading(time: int) -> dict[str, Any]:
    """A memory of 4 heads, whose keys two share."""
    q, k = (numbers(BATCH, time, KV_HEADS * DIM) for _ in range(2))
    return {
        "q": q, "k": k, "v": numbers(BATCH, time, HEADS * 8), "decay": -numbers(BATCH, time, HEADS).abs(),
        "past": numbers(BATCH, HEADS, DIM, 8), "num_heads": HEADS, "num_groups": KV_HEADS,
    }  # fmt: skip


def corrected(time: int) -> dict[str, Any]:
    """A memory of 4 heads that is told what was wrong; keys have length 1."""
    given = fading(time)
    keys = torch.nn.functional.normalize(given["k"].reshape(BATCH, time, KV_HEADS, DIM), dim=-1)
    return given | {"k": keys.flatten(2), "beta": torch.rand(BATCH, time, HEADS)}


def scanned(time: int) -> dict[str, Any]:
    """A state of 5 numbers for each of 6 features."""
    x, dt = numbers(BATCH, time, 6), numbers(BATCH, time, 6).abs()
    b, c = (numbers(BATCH, time, 5) for _ in range(2))
    return {"x": x, "dt": dt, "a": -numbers(6, 5).abs(), "b": b, "c": c, "past": numbers(BATCH, 6, 5)}


def shared(time: int) -> dict[str, Any]:
    """Of the first row's tokens, every other has chosen the expert; of the second's, none."""
    share = torch.rand(BATCH, time, 1) * (torch.arange(time) % 2 == 0)[:, None] * torch.tensor([1, 0])[:, None, None]
    x, total = (numbers(BATCH, time, FEATURES) for _ in range(2))
    up, down = numbers(HIDDEN, FEATURES) / 5, numbers(FEATURES, HIDDEN) / 5
    return {"total": total, "x": x, "share": share, "up": up, "down": down}


def plain(op: str, time: int) -> dict[str, Any]:
    """The least that a node of an op has."""
    torch.manual_seed(0)
    x, gain = numbers(BATCH, time, FEATURES), numbers(FEATURES, mean=1.0)
    every: Mapping[str, Any] = {
        "Attention": lambda: attending(time),
        "WindowAttention": lambda: around(time),
        "Expert": lambda: shared(time),
        "Linear": lambda: {"x": x, "weight": numbers(HIDDEN, FEATURES)},
        "Embedding": lambda: {"weight": numbers(50, FEATURES), "indices": torch.randint(0, 50, (BATCH, time))},
        "RMSNorm": lambda: {"x": x, "weight": gain, "epsilon": 0.1},
        "AddRMSNorm": lambda: {"a": x, "b": numbers(*x.shape), "weight": gain, "epsilon": 0.1},
        "TakePositions": lambda: {"hidden": x, "positions": torch.zeros(BATCH, 1, dtype=torch.int64) + (time > 1)},
        "RNN": lambda: recurrent(1, time, activation="tanh"),
        "LSTM": lambda: recurrent(4, time, c=numbers(BATCH, HIDDEN)),
        "GRU": lambda: recurrent(3, time),
        "SelectiveScan": lambda: scanned(time),
        "LinearAttention": lambda: fading(time),
        "GatedDelta": lambda: corrected(time),
        "SourceAttention": lambda: looking(time),
    }
    return every[op]()


MORE: dict[tuple[str, str], Any] = {  # what a node may have besides: by op and name, with what must go with it
    ("Linear", "bias"): lambda: {"bias": numbers(HIDDEN)},
    ("Attention", "cos"): lambda: dict(zip(("cos", "sin"), angles(), strict=True)),
    ("Attention", "sin"): lambda: dict(zip(("cos", "sin"), angles(), strict=True)),
    ("Attention", "q_norm"): lambda: {"q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0)},
    ("Attention", "k_norm"): lambda: {"q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0)},
    ("Attention", "epsilon"): lambda: {
        "q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0), "epsilon": 0.5,
    },
    **{
        ("WindowAttention", name): lambda more=more: more()
        for name, more in (
            ("cos", lambda: dict(zip(("cos", "sin"), angles(), strict=True))),
            ("sin", lambda: dict(zip(("cos", "sin"), angles(), strict=True))),
            ("q_norm", lambda: {"q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0)}),
            ("k_norm", lambda: {"q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0)}),
            ("epsilon", lambda: {"q_norm": numbers(DIM, mean=1.0), "k_norm": numbers(DIM, mean=1.0), "epsilon": 0.5}),
            ("softcap", lambda: {"softcap": 1.5}),
            ("window", lambda: {"window": 2}),
        )
    },
    ("Attention", "softcap"): lambda: {"softcap": 1.5},
    ("Attention", "window"): lambda: {"window": 3},
    ("Attention", "softcap and window"): lambda: {"softcap": 1.5, "window": 4},
    ("Attention", "sinks"): lambda: {"sinks": numbers(HEADS) * 3},
    ("Attention", "sinks and window"): lambda: {"sinks": numbers(HEADS) * 3, "window": 3},
    ("Attention", "sinks and softcap"): lambda: {"sinks": numbers(HEADS), "softcap": 1.5},
    ("Attention", "distances"): lambda: {"distances": numbers(5, HEADS) * 2},
    ("Expert", "gate"): lambda: {"gate": numbers(HIDDEN, FEATURES) / 5},
    ("Expert", "gate_bias"): lambda: {"gate": numbers(HIDDEN, FEATURES) / 5, "gate_bias": numbers(HIDDEN)},
    ("Expert", "up_bias"): lambda: {"up_bias": numbers(HIDDEN)},
    ("Expert", "down_bias"): lambda: {"down_bias": numbers(FEATURES)},
    ("Expert", "packed"): lambda: {"up": numbers(2 * HIDDEN, FEATURES) / 5, "packed": True},
    **{
        ("Expert", name): lambda more=more: {"gate": numbers(HIDDEN, FEATURES) / 5, **more}
        for name, more in (
            ("activation", {"activation": "gelu_tanh"}), ("gelu", {"activation": "gelu"}),
            ("relu", {"activation": "relu"}), ("relu2", {"activation": "relu2"}), ("slope", {"slope": 1.7}),
            ("slope of gelu", {"activation": "gelu", "slope": 0.7}), ("offset", {"offset": 1.0}),
            ("limit", {"limit": 0.5}),
        )
    },
    ("SourceAttention", "bias"): lambda: {"bias": numbers(1, HEADS, 1, SOURCE) * 2},
    ("LinearAttention", "past"): lambda: {"past": None},
    ("GatedDelta", "past"): lambda: {"past": None},
    ("SelectiveScan", "past"): lambda: {"past": None},
    ("RNN", "activation"): lambda: {"activation": "relu"},
    ("RNN", "lengths"): lambda: {"lengths": None},
    ("LSTM", "lengths"): lambda: {"lengths": None},
    ("GRU", "lengths"): lambda: {"lengths": None},
}  # fmt: skip


def angles() -> tuple[Tensor, Tensor]:
    turn = torch.arange(CAPACITY)[:, None] * 10 ** (-torch.arange(DIM // 2) / (DIM // 2))
    return turn.cos(), turn.sin()


def may_have(op: Op) -> list[str]:
    return [*sorted(op.optional), *(n for n, default in op.attributes.items() if default is not REQUIRED)]


BUILT_IN = sorted(name for name, op in OPS.items() if op.reference.__module__.startswith("edgellm."))
CASES = [(name, "") for name in BUILT_IN] + [(name, more) for name in BUILT_IN for more in may_have(OPS[name])]
CASES += [case for case in MORE if case not in CASES]
ROLES = [(name, role) for name, target in TARGETS.items() for role in ((PREFILL, DECODE) if target.roles else ("",))]


def graph_of(op: Op, arguments: Mapping[str, Any], time: int) -> ir.Model:
    """One node between inputs and outputs, as a capture would leave it."""

    def value(name: str, tensor: Tensor) -> ir.Value:
        given = ir.tensor(tensor.numpy(), name=name)
        shape = ir.Shape(list(tensor.shape))
        return ir.Value(
            name=name, shape=shape, type=ir.TensorType(given.dtype), const_value=given if name in WEIGHTS else None
        )

    tensors = {name: value(name, x) for name, x in arguments.items() if isinstance(x, Tensor)}
    if "tokens" not in tensors:
        tensors["tokens"] = value("tokens", torch.zeros(BATCH, time, dtype=torch.int64))
    node = op.node(ir.node, **{n: tensors.get(n, x) for n, x in arguments.items()})
    reference = op.reference(**arguments)
    results = (reference,) if isinstance(reference, Tensor) else reference
    for output, like, name in zip(node.outputs, results, op.outputs, strict=True):
        output.name, output.shape = name, ir.Shape(list(like.shape))
        output.type = ir.TensorType(ir.DataType.FLOAT)
    for name, past in (*op.caches.items(), *op.states.items()):  # engines want states to be the graph's own
        if name in tensors:
            tensors[name].name = f"past.{past}"
    inputs = [v for v in tensors.values() if v.const_value is None]
    weights = [v for v in tensors.values() if v.const_value is not None]
    opsets = {"": 23, "edgellm": 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=weights, opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def form_of(target: Target, role: str, time: int) -> Form | None:
    return Form(role, time, CAPACITY, "float32") if target.roles else None


def computed(op: Op, arguments: Mapping[str, Any], target: Target, role: str, time: int) -> list[np.ndarray] | str:
    """What a target's graph gives, or what it is refused with."""
    graph = graph_of(op, arguments, time)
    expand_references(graph, target.rules)
    try:
        model = lower_to(graph, target, Plan(), form_of(target, role, time))
    except LoweringError as error:
        return str(error)
    feeds = {
        (f"past.{op.caches.get(n) or op.states[n]}" if n in (*op.caches, *op.states) else n): x.numpy()
        for n, x in arguments.items() if isinstance(x, Tensor)
    }  # fmt: skip
    feeds["tokens"] = np.zeros((BATCH, time), np.int64)
    if arguments.get("lengths") is not None:
        feeds["total_length"] = (arguments["lengths"] + arguments.get("past_lengths", 0)).max().numpy()
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))


def valid(op: Op, name: str, found: np.ndarray, arguments: Mapping[str, Any]) -> np.ndarray:
    """What is defined of an output: nothing is promised of padding, or of slots that hold it."""
    rows = arguments.get("lengths")
    if rows is None or name in op.states.values():
        return found
    if name in op.caches.values():
        end = (arguments["past_lengths"] + rows)[:, None, None, None].numpy()
        return np.where(np.arange(CAPACITY)[:, None] < end, found, 0)
    return np.where(np.arange(found.shape[1])[:, None] < rows[:, None, None].numpy(), found, 0)


@pytest.mark.parametrize(("target", "role"), ROLES, ids=["-".join(filter(None, r)) for r in ROLES])
@pytest.mark.parametrize(("name", "more"), CASES, ids=[" with ".join(filter(None, c)) for c in CASES])
def test_a_rule_computes_what_the_reference_does_or_refuses_by_name(
    name: str, more: str, target: str, role: str
) -> None:
    op = OPS[name]
    for time in (1,) if role == DECODE else (5,) if role == PREFILL else (1, 5):
        arguments = plain(name, time) | (MORE[name, more]() if more else {})
        found = computed(op, arguments, TARGETS[target], role, time)
        if isinstance(found, str):
            assert more
            assert any(given in found for given in more.split(" and ")) and name in found
            continue
        expected = op.reference(**arguments)
        for output, a, b in zip(
            op.outputs, found, (expected,) if isinstance(expected, Tensor) else expected, strict=True
        ):
            a, b = (valid(op, output, x, arguments) for x in (a, b.numpy()))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=output)
        if more:
            without = op.reference(**plain(name, time))
            first = (without if isinstance(without, Tensor) else without[0], expected)
            assert more == "lengths" or not np.allclose(*(x if isinstance(x, Tensor) else x[0] for x in first)), (
                "the case changes nothing, and so shows nothing"
            )


@pytest.mark.parametrize("more", ["", "softcap", "window", "sinks"])
def test_a_cache_of_8_bits_keeps_to_what_the_op_was_given(more: str) -> None:
    """The past is in codes already; what is rounded is the new token's key and value."""
    op, arguments = OPS["Attention"], plain("Attention", 1) | (MORE["Attention", more]() if more else {})
    scales, codes = {}, {}
    for name, output in op.caches.items():
        scale = np.full(KV_HEADS * DIM, 8 / 127, np.float32)
        codes[name] = (arguments[name] * 127 / 8).round().clamp(-127, 127).to(torch.int8)
        arguments[name] = codes[name].float() * 8 / 127
        scales[output] = scale
    model = lower_to(graph_of(op, arguments, 1), TARGETS["cpu"], Plan(caches=NarrowCaches(scales)))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).removeprefix("past.") in scales:
            value.type = ir.TensorType(ir.DataType.INT8)
    feeds = {n: x.numpy() for n, x in arguments.items() if isinstance(x, Tensor)}
    feeds |= {f"past.{op.caches[name]}": found.numpy() for name, found in codes.items()}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(["y"], {i.name: feeds.get(i.name, np.zeros((BATCH, 1), np.int64)) for i in session.get_inputs()})[0]
    expected = op.reference(**arguments)[0].numpy()
    assert np.abs(y - expected).max() < 0.05
    if more:
        without = op.reference(**{n: x for n, x in arguments.items() if n != more})[0].numpy()
        assert np.abs(y - without).max() > 0.2


@pytest.mark.parametrize(("time", "window"), [(700, 0), (700, 50), (1, 0)])
def test_sinks_take_their_share_of_long_texts_too(time: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's kernel computes long prompts by another path than short ones."""
    monkeypatch.setitem(globals(), "CAPACITY", 720)
    op, arguments = OPS["Attention"], attending(time) | {"sinks": numbers(HEADS) * 3, "window": window}
    arguments["lengths"] = torch.full((BATCH,), time, dtype=torch.int32)
    found = computed(op, arguments, TARGETS["cpu"], "", time)[0]
    np.testing.assert_allclose(found, op.reference(**arguments)[0].numpy(), rtol=1e-4, atol=1e-4)


def test_the_cases_have_everything_that_an_op_may_be_given() -> None:
    assert not [case for case in CASES if case[1] and case not in MORE]


def rule(context: Lowering, view: Any) -> list[ir.Value]:
    """Knows nothing of biases, nor of an epsilon."""
    y = context.op("MatMul", view.x, view.weight)
    return [y] if view.op.name == "Linear" else [context.op("Mul", view.x, view.weight)]


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("Linear", "bias", r"Linear: the rule in .*test_ops_on_targets.py does not read its input bias \('bias'\)"),
        ("RMSNorm", "", r"RMSNorm: the rule in .*test_ops_on_targets.py does not read its attribute epsilon \(0.1\)"),
    ],
)
def test_a_rule_that_ignores_what_it_is_given_is_caught(name: str, more: str, said: str) -> None:
    arguments = plain(name, 5) | (MORE[name, more]() if more else {})
    with pytest.raises(LoweringError, match=said):
        lower(graph_of(OPS[name], arguments, 5), {name: rule}, Plan())


def test_what_an_op_does_not_know_is_refused_before_any_rule() -> None:
    graph = graph_of(OPS["Linear"], plain("Linear", 5), 5)
    next(iter(graph.graph)).attributes["loudness"] = ir.AttrInt64("loudness", 3)
    with pytest.raises(LoweringError, match="node Linear has an attribute loudness that the op does not know"):
        lower(graph, TARGETS["onnx"].rules, Plan())
