"""Attention of edgellm's own: which nodes it stands for, and numbers that depend on nothing but what a token sees."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_attention_trial import AttentionForm, attention_error, attention_form
from edgellm_runtime.backends.own_kernels import find
from edgellm_runtime.backends.own_trial import OWN_BOUND
from edgellm_runtime.graphs.own_attention import ATTENTIONS, DOMAIN
from edgellm_runtime.graphs.own_operators import with_own_operators
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, Node, graph_bytes

Array = NDArray[Any]
FORMS = ("avx512-vnni", "avx2", "neon-dotprod", "plain")
HEADS, CACHED, SIZE, SLOTS = 6, 2, 64, 600
TABLES = [f(np.outer(np.arange(SLOTS), 0.1 ** np.arange(SIZE // 2))).astype(np.float32) for f in (np.cos, np.sin)]
SCALES = np.random.default_rng(4).uniform(0.02, 0.03, (2, CACHED * SIZE)).astype(np.float32)


NORMS = np.random.default_rng(5).uniform(0.5, 1.5, (2, SIZE)).astype(np.float32)  # of queries and of keys


def normed(change: dict[str, Any]) -> tuple[list[Node], dict[str, Array], dict[str, Any]]:
    """Nodes that norm heads of queries and keys, with one thing changed; constants, and what the attention reads."""
    constants: dict[str, Array] = {"sizes": np.array([HEADS * SIZE, CACHED * SIZE, CACHED * SIZE])}
    nodes = [Node("Split", ["x", "sizes"], ["q", "k0", "v0"], {"axis": change.pop("axis", -1)})]
    for name, heads, weight in (("q", HEADS, NORMS[0]), ("k0", CACHED, NORMS[1])):
        shapes = {"apart": [0, 0, heads, SIZE], "whole": [0, 0, change.pop("whole", heads * SIZE)]}
        constants |= {f"{name}_{key}": np.array(value) for key, value in shapes.items()} | {f"{name}_norm": weight}
        nodes += [
            Node("Reshape", [name, f"{name}_apart"], [f"{name}_heads"]),
            Node("SimplifiedLayerNormalization", [f"{name}_heads", f"{name}_norm"], [f"{name}_normed"],
                 {"axis": -1, "epsilon": change.pop("epsilon", 1e-5)}),
            Node("Reshape", [f"{name}_normed", f"{name}_whole"], [f"{name}_ready"]),
        ]  # fmt: skip
    return nodes, constants, {"q": "q_ready", "k": "k0_ready", "v": change.pop("values", "v0")}


def exported(*, narrow: bool = False, half: bool = False, window: int = 0, norms: bool = False, **change: Any) -> bytes:
    """A graph of one GroupQueryAttention, with something other than usual about it."""
    cache = "int8" if narrow else "float16" if half else "float32"
    dtypes = {"x": "float32", "k": cache, "v": cache, "last": "int32", "longest": "int32"}
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": CACHED, "scale": 0.125, "do_rotary": 1}
    attributes |= {"local_window_size": window} if window else {}
    inputs = ["x", "", "", "k", "v", "last", "longest", "cos", "sin"]
    tensors: dict[str, Array] = {"cos": TABLES[0], "sin": TABLES[1]}
    if narrow:
        inputs += ["", "", "", "ks", "vs"]
        tensors |= {"ks": SCALES[0], "vs": SCALES[1]}
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    inputs, size = change.pop("inputs", inputs), change.pop("size", SIZE)
    before: list[Node] = []
    if norms:
        before, constants, parts = normed(change)
        tensors |= constants
        inputs[:3] = parts.values()
    attributes = {name: value for name, value in (attributes | change).items() if value is not None}
    slots = ["batch", CACHED, SLOTS, size]
    shapes: dict[str, Any] = {"longest": [], "k": slots, "v": slots, "x": ["batch", "time", (HEADS + 4) * size]}
    outputs = {"y": "float32", "next_k": cache, "next_v": cache}
    gives, after = list(outputs), list[Node]()
    if half:
        kinds = [ELEMENT_TYPES[name] for name in ("float32", change.pop("back", "float16"))]
        before += [Node("Cast", [name], [f"{name}_wide"], {"to": kinds[0]}) for name in ("k", "v")]
        after = [Node("Cast", [f"{name}_wide"], [name], {"to": kinds[1]}) for name in gives[1:]]
        inputs[3:5], gives[1:] = ["k_wide", "v_wide"], [f"{name}_wide" for name in gives[1:]]
        attributes = {name: value for name, value in attributes.items() if name != "back"}
    node = Node("GroupQueryAttention", inputs, gives, attributes, domain="com.microsoft", name="a")
    made = {name for each in before for name in each.outputs}
    dtypes |= {name: "float32" for name in inputs if name and name not in {**dtypes, **tensors} and name not in made}
    return graph_bytes([*before, node, *after], dtypes, outputs, tensors=tensors, shapes=shapes)


@pytest.mark.parametrize(
    ("narrow", "change"),
    [
        (False, {}),
        (False, {"window": 7}),
        (False, {"softcap": 0.0, "smooth_softmax": -1}),
        (True, {}),
        (False, {"norms": True}),
        (True, {"norms": True}),
    ],
    ids=str,
)
def test_attention_over_a_cache_is_theirs(narrow: bool, change: dict[str, Any]) -> None:
    _, (node,) = with_own_operators(exported(narrow=narrow, **change))
    sizes = {"num_heads": HEADS, "kv_num_heads": CACHED, "scale": 0.125, "do_rotary": 1}
    normed = change.get("norms", False)
    inputs = ["x", "k", "v", "last", "longest", "cos", "sin"]
    inputs += ["q_norm", "k0_norm"] if normed else ["", ""] if narrow else []
    inputs += ["ks", "vs"] if narrow else []
    sizes |= {"window": change.get("window", 0), "norms": int(normed), "epsilon": float(np.float32(1e-5 * normed))}
    sizes |= {"head_size": SIZE}
    outputs = ("y", "next_k", "next_v")
    assert node == Node(ATTENTIONS["int8" if narrow else "float32"], inputs, outputs, sizes, domain=DOMAIN, name="a")
    assert attention_form(node).size == SIZE  # so that what is tried at load is what runs


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 30.0}, {"smooth_softmax": 1}, {"rotary_interleaved": 1}, {"scale": None}, {"scale": 0.0},
        {"qk_output": 1}, {"do_rotary": 0}, {"size": 24}, {"k_quant_type": "PER_TENSOR"},
        {"inputs": ["x", "x", "x", "k", "v", "last", "longest", "cos", "sin"]},
        {"inputs": ["x", "", "", "k", "v", "last", "longest", "cos", "sin", "", "", "sinks"]},
        {"inputs": ["x", "", "", "k", "v", "last", "longest", "cos", "sin", "", "", "", "ks", "vs"]},
        {"narrow": True, "kv_cache_bit_width": 4}, {"narrow": True, "k_quant_type": None},
        {"norms": True, "axis": 1}, {"norms": True, "values": "k0"}, {"norms": True, "whole": -1},
        {"norms": True, "epsilon": 1e-6}, {"norms": True, "num_heads": 3},
    ],
    ids=str,
)  # fmt: skip
def test_attention_of_other_kinds_stays_as_it_is(change: dict[str, Any]) -> None:
    model = exported(**change)
    assert with_own_operators(model) == (model, ())


def test_a_cache_that_is_cast_before_attention_and_back_is_read_as_it_lies() -> None:
    _, (node,) = with_own_operators(exported(half=True))
    assert (node.op, node.inputs[1:3], node.outputs[1:]) == (ATTENTIONS["float16"], ["k", "v"], ("next_k", "next_v"))
    _, nodes = with_own_operators(exported(half=True, back="float64"))
    assert not nodes


@functools.cache
def kernels() -> Any:
    return pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")


@functools.cache
def loaded() -> Any:
    return ctypes.CDLL(str(kernels().library()))


def attention(
    form: str, q: Array, k: Array, v: Array, begins: Array, ends: Array, together: int, *, many: bool = False
) -> Array:
    """By a form of the library, without ONNX Runtime: queries (rows, size) over one head; many by turned keys."""
    y = np.empty_like(q)
    arrays = [each.ctypes.data_as(ctypes.c_void_p) for each in (q, k, v, begins, ends, y)]
    sizes = (int(many), 8 * k.itemsize, len(q), together, *k.shape)
    assert not loaded().edgellm_attention(form.encode(), *sizes, ctypes.c_float(0.3), *arrays)
    return y


def cells(numbers: Array, bits: int) -> Array:
    """Numbers as a cache keeps them; codes without scales."""
    return np.rint(40 * numbers).clip(-128, 127).astype(np.int8) if bits == 8 else numbers.astype(f"float{bits}")


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 9), count=st.sampled_from([1, 15, 16, 200, 256, 257, 700]),
    size=st.sampled_from([16, 32, 48, 64, 80, 128, 256]), together=st.integers(1, 4),
    window=st.sampled_from([1, 20, 1000]),
    bits=st.sampled_from([32, 16, 8]),
)  # fmt: skip
def test_every_form_gives_a_query_the_same_bits_whatever_is_beside_it(
    seed: int, rows: int, count: int, size: int, together: int, window: int, bits: int
) -> None:
    kernels()
    draw = np.random.default_rng(seed)
    q, *kept = (draw.standard_normal((n, size)).astype(np.float32) for n in (rows, count, count))
    held = [cells(each, bits) for each in kept]
    k, v = (each.astype(np.float32) for each in held)
    ends = draw.integers(1, count + 1, rows).astype(np.int32)
    begins = np.maximum(0, ends - window).astype(np.int32)
    expected = attention("plain", q, *(held if bits == 8 else (k, v)), begins, ends, 1)
    for i in range(rows):
        query, slots = q[i].astype(np.float64), slice(begins[i], ends[i])
        step = np.abs(query).max() / 32767 if bits == 8 else 1.0  # over codes queries are whole numbers of 16 bits
        scores = 0.3 * k[slots].astype(np.float64) @ (np.rint(query / step) * step if bits == 8 else query)
        weights = np.exp(scores - scores.max())
        close = 1e-5 + (np.abs(v[slots]).sum(0).max() / 32767 / weights.sum() if bits == 8 else 0)  # and so are weights
        np.testing.assert_allclose(expected[i], weights / weights.sum() @ v[slots], rtol=1e-4, atol=close)
    for form in FORMS:
        if loaded().edgellm_has_form(form.encode()):
            np.testing.assert_array_equal(attention(form, q, *held, begins, ends, together), expected, err_msg=form)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 60), count=st.sampled_from([1, 15, 33, 200, 256, 257, 700]),
    size=st.sampled_from([16, 32, 48, 64, 80, 128, 256]), together=st.integers(1, 48),
    window=st.sampled_from([1, 20, 1000]),
    in_order=st.booleans(), bits=st.sampled_from([32, 16, 8]),
)  # fmt: skip
def test_tiles_of_many_queries_give_each_the_bits_that_it_gets_alone(
    seed: int, rows: int, count: int, size: int, together: int, window: int, in_order: bool, bits: int
) -> None:
    kernels()
    draw = np.random.default_rng(seed)
    q, *kept = (draw.standard_normal((n, size)).astype(np.float32) for n in (rows, count, count))
    k, v = (cells(each, bits) for each in kept)
    ends = draw.integers(1, count + 1, rows).astype(np.int32)
    if in_order:
        ends = np.minimum(count, ends.min() + np.arange(rows, dtype=np.int32) // 3)
    begins = np.maximum(0, ends - window).astype(np.int32)
    if bits > 8:
        k[ends.max() :], v[ends.max() :] = np.nan, np.inf  # what no query sees
    expected = attention("plain", q, k, v, begins, ends, 1)
    for form in FORMS:
        if loaded().edgellm_has_form(form.encode()):
            found = attention(form, q, k, v, begins, ends, together, many=True)
            np.testing.assert_array_equal(found, expected, err_msg=form)


def test_every_form_rounds_to_the_nearest_of_16_bits_and_no_further_than_the_largest() -> None:
    kernels()
    patterns = np.random.default_rng(6).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    halves = (
        np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    )  # all that are finite and not below 0
    ties = (halves[:-1] + halves[1:]) / 2
    far = np.array([1e9, -1e9, 65519.9, 65520.0, np.inf, -np.inf], np.float32)
    x = np.concatenate([far, patterns, -halves, halves, ties, -ties])
    x = x[~np.isnan(x)]
    x = np.ascontiguousarray(x[: len(x) // 16 * 16], np.float32)
    expected = np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
    for form in FORMS:
        if loaded().edgellm_has_form(form.encode()):
            found = np.empty_like(expected)
            arrays = [each.ctypes.data_as(ctypes.c_void_p) for each in (x, found)]
            assert not loaded().edgellm_halve(form.encode(), len(x), *arrays)
            np.testing.assert_array_equal(found, expected, err_msg=form)


class Layer:
    """A session over a cache that goes on from step to step."""

    def __init__(self, graph: bytes, *, threads: int = 2, batch: int = 1, dtype: str = "float32") -> None:
        ort = library()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        find(ort).add_to(options)
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        slots = np.zeros((batch, CACHED, SLOTS, SIZE), dtype)
        self.caches, self.lengths = [slots, slots.copy()], np.zeros(batch, np.int32)

    def step(self, x: Array, lengths: Sequence[int] | None = None) -> Array:
        """Read x (batch, time, features), of which each row's first ``lengths`` count."""
        new = np.array(lengths if lengths is not None else [x.shape[1]] * len(x), np.int32)
        total = self.lengths + new
        given = {"x": x, "k": self.caches[0], "v": self.caches[1], "last": total - 1, "longest": np.array(total.max())}
        y, *self.caches = self.session.run(None, given)
        self.lengths = total
        found: Array = y
        return found


def tokens(batch: int, time: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, time, (HEADS + 4) * SIZE)).astype(np.float32)


def own(**change: Any) -> bytes:
    return with_own_operators(exported(**change))[0]


KINDS: dict[str, dict[str, Any]] = {
    "floats": {}, "window": {"window": 50}, "norms": {"norms": True}, "8 bits": {"narrow": True},
    "8 bits, norms": {"narrow": True, "norms": True}, "16 bits": {"half": True},
    "16 bits, norms": {"half": True, "norms": True, "window": 50},
}  # fmt: skip


def dtype_of(kind: str) -> str:
    return "int8" if "8 bits" in kind else "float16" if "16 bits" in kind else "float32"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_gets_the_same_bits_alone_in_pieces_and_at_once(kind: str, threads: int) -> None:
    kernels()
    x, dtype = tokens(1, 300), dtype_of(kind)
    layers = [Layer(own(**KINDS[kind]), threads=n, dtype=dtype) for n in (threads, 1, 2)]
    whole = layers[0].step(x)
    pieces = [layers[1].step(x[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 280), (280, 300))]
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    alone = [layers[2].step(x[:, i : i + 1]) for i in range(300)]
    np.testing.assert_array_equal(np.concatenate(alone, 1), whole)
    for cache, other in zip(layers[0].caches, layers[2].caches, strict=True):
        np.testing.assert_array_equal(cache, other)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_get_the_bits_that_each_gets_alone(kind: str) -> None:
    kernels()
    dtype, lengths = dtype_of(kind), [270, 4, 131]
    x, after = tokens(3, 270), tokens(3, 1, seed=1)
    together = Layer(own(**KINDS[kind]), batch=3, dtype=dtype)
    prompt, token = together.step(x, lengths), together.step(after)
    for row, length in enumerate(lengths):
        alone = Layer(own(**KINDS[kind]), dtype=dtype)
        np.testing.assert_array_equal(alone.step(x[row : row + 1, :length])[0], prompt[row, :length])
        np.testing.assert_array_equal(alone.step(after[row : row + 1])[0], token[row])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_close_to_that_of_onnx_runtime(kind: str) -> None:
    kernels()
    dtype = dtype_of(kind)
    close = 1e-5 if dtype == "float32" else 1e-3
    ours, theirs = (Layer(graph(**KINDS[kind]), dtype=dtype) for graph in (own, exported))
    for seed, time in enumerate((120, 1, 1, 9, 1)):
        x = tokens(1, time, seed)
        y, expected = ours.step(x), theirs.step(x)
        assert np.linalg.norm(y - expected) < close * np.linalg.norm(expected)
    for cache, other in zip(ours.caches, theirs.caches, strict=True):
        assert np.abs(cache.astype(np.float64) - other).max() <= (1 if dtype == "int8" else close)  # a code at a tie


@pytest.mark.parametrize("kind", ["floats", "16 bits", "8 bits"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_later_token_and_slots_not_in_use_spoil_nothing(kind: str, wrong: float) -> None:
    kernels()
    dtype = dtype_of(kind)
    x, (layer, spoilt) = tokens(2, 40), (Layer(own(**KINDS[kind]), batch=2, dtype=dtype) for _ in range(2))
    for cache in spoilt.caches:
        cache[:] = -77 if dtype == "int8" else wrong
    other = x.copy()
    other[0, 30] = wrong
    found, expected = spoilt.step(other), layer.step(x)
    np.testing.assert_array_equal(found[0, :30], expected[0, :30])
    np.testing.assert_array_equal(found[1], expected[1])
    assert np.isnan(found[0, 30]).all()


@pytest.mark.parametrize("op", ATTENTIONS.values())
@pytest.mark.parametrize(("together", "size"), [(1, 32), (3, 48), (3, 64), (3, 128)])
def test_the_trial_at_load_finds_it_right(op: str, together: int, size: int) -> None:
    kernels()
    for window, turned, normed in ((False, True, False), (True, False, True), (False, True, True)):
        error = attention_error(AttentionForm(op, size, together, window, turned, normed))
        assert 0 < error < OWN_BOUND / (100 if op == ATTENTIONS["int8"] else 1000)  # numbers of 16 bits, and of 32


def test_a_graph_that_names_more_tokens_than_its_rows_hold_gets_no_more_memory() -> None:
    kernels()
    inputs = ["x", "", "", "k", "v", "last", "longest"]  # without tables, which are as long as what is named
    layer = Layer(own(inputs=inputs, do_rotary=0))
    layer.step(tokens(1, 300))
    given = {"x": tokens(1, 9, seed=1), "k": layer.caches[0], "v": layer.caches[1], "last": np.array([308], np.int32)}
    right, wrong = (layer.session.run(["y"], given | {"longest": np.array(n, np.int32)})[0] for n in (309, 2**31 - 1))
    np.testing.assert_array_equal(wrong, right)


def test_steps_that_do_not_fit_are_refused() -> None:
    kernels()
    layer = Layer(own())
    layer.lengths[:] = SLOTS
    with pytest.raises(Exception, match=r"does not fit into the cache|too few positions"):
        layer.step(tokens(1, 1))
    with pytest.raises(Exception, match=r"number or size|Got invalid dimensions"):
        Layer(own()).step(tokens(1, 1)[..., :SIZE].copy())
