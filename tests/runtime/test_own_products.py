"""The library of edgellm's own kernels: the same bits in every form and for every neighbour, as the reference says."""

from __future__ import annotations

import ctypes
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from own_graphs import EPSILON, Chain, Matrix, layer, opened
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load, open_session
from edgellm_runtime.backends import own_trial
from edgellm_runtime.backends.kernel_test import ALL_ROWS
from edgellm_runtime.backends.own_trial import OWN_BOUND, OwnForm, ProductForm, own_error
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.profile import profile
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.graphs.own_operators import BITS, BLOCKS, DOMAIN, OPERATORS, with_own_operators
from edgellm_runtime.graphs.writer import Node, graph_bytes

edgellm_kernels = pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")

Array = NDArray[Any]
FORMS = ("avx512-vnni", "avx2", "neon-dotprod", "plain")


@functools.cache
def loaded() -> Any:
    return ctypes.CDLL(str(edgellm_kernels.library()))


def here() -> list[str]:
    return [form for form in FORMS if loaded().edgellm_has_form(form.encode())]


def pointer(array: Array) -> Any:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


def product(matrix: Matrix, form: str, x: Array) -> Array:
    """By a form of the library, without ONNX Runtime."""
    outputs, inputs = matrix.shape
    y = np.full((len(x), outputs), 7, np.float32)
    zeros = None if matrix.zeros is None else pointer(matrix.zeros)
    failed = loaded().edgellm_product(
        form.encode(), len(x), outputs, inputs, matrix.bits, matrix.block, pointer(np.ascontiguousarray(x)),
        pointer(matrix.codes), pointer(matrix.scales), zeros, pointer(y),
    )  # fmt: skip
    assert not failed
    return y


def session(matrix: Matrix, *, own: bool = True, threads: int = 2) -> Any:
    """One product's, as it is exported or by the operator."""
    chain = Chain()
    chain.product(matrix, "x", "y")
    graph = chain.model(matrix.shape[1], "y")
    return opened(with_own_operators(graph)[0] if own else graph, threads)


def rows(count: int, inputs: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((count, inputs)).astype(np.float32)


def reference(matrix: Matrix, x: Array) -> Array:
    """What product.h states, in NumPy. A float64 holds the product of two float32 exactly, its sum nearly always."""
    codes, scales = matrix.weights()
    _, blocks, block = codes.shape
    padded = np.pad(x, ((0, 0), (0, blocks * block - x.shape[1]))).reshape(len(x), blocks, block)
    top = np.abs(padded).max(-1)
    rounded = np.rint(padded * (np.float32(127) / top)[..., None]).astype(np.int64)
    assert rounded.dtype == np.int64 and np.abs(rounded).max() == 127
    whole = np.einsum("rbi,obi->rob", rounded, codes).astype(np.float32)
    y = np.zeros((len(x), len(codes)), np.float32)
    for b in range(blocks):
        both = scales[:, b] * (top[:, b, None] / np.float32(127))
        y = (whole[..., b].astype(np.float64) * both.astype(np.float64) + y).astype(np.float32)
    return y


def test_this_processor_has_a_form() -> None:
    assert edgellm_kernels.form() in here()
    assert here()[-1] == "plain"


def check_forms(matrix: Matrix, x: Array) -> None:
    plain = product(matrix, "plain", x)
    np.testing.assert_allclose(plain, reference(matrix, x), rtol=1e-6, atol=1e-6 * np.abs(plain).max())
    for form in here():
        np.testing.assert_array_equal(product(matrix, form, x), plain, err_msg=form)


@pytest.mark.parametrize("half", [True, False], ids=["float16 scales", "float32 scales"])
@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_every_form_gives_the_bits_of_the_reference(bits: int, block: int, zeros: bool, half: bool) -> None:
    for outputs, inputs in ((33, 3 * block), (70, 2 * block + 18), (32, block), (5, 7)):
        check_forms(Matrix(1, outputs, inputs, block, zeros=zeros, half=half, bits=bits), rows(9, inputs))


@pytest.mark.parametrize("half", [True, False], ids=["float16 scales", "float32 scales"])
@pytest.mark.parametrize("inputs", [16, 144, 4096])
def test_rows_of_one_scale_give_the_bits_of_the_reference(inputs: int, half: bool) -> None:
    for outputs in (33, 5):
        check_forms(Matrix(1, outputs, inputs, 0, half=half, bits=8), rows(9, inputs))


def test_the_largest_codes_do_not_overflow() -> None:
    for block, inputs in ((128, 256), (0, 65536)):
        matrix = Matrix(1, 32, inputs, block, half=False, bits=8)
        matrix.codes[:] = 0 if block else -128
        check_forms(matrix, np.ones((3, inputs), np.float32))
        matrix.codes[:] = 255 if block else 127
        check_forms(matrix, np.concatenate([np.ones((1, inputs), np.float32), -np.ones((2, inputs), np.float32)]))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000), outputs=st.integers(1, 80), inputs=st.integers(1, 300), block=st.sampled_from(BLOCKS),
    count=st.integers(1, 9), zeros=st.booleans(), half=st.booleans(), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    bits=st.sampled_from(BITS),
)  # fmt: skip
def test_forms_agree_on_any_shape(
    seed: int, outputs: int, inputs: int, block: int, count: int, zeros: bool, half: bool, size: float, bits: int
) -> None:
    matrix = Matrix(seed, outputs, inputs, block, zeros=zeros, half=half, bits=bits)
    x = rows(count, inputs, seed) * np.float32(size)
    x[0, :: 1 + seed % 3] = 0
    plain = product(matrix, "plain", x)
    for form in here():
        np.testing.assert_array_equal(product(matrix, form, x), plain, err_msg=form)


def elementwise(name: str, form: str, *arguments: Any) -> None:
    function = getattr(loaded(), f"edgellm_{name}")
    given = [
        pointer(a) if isinstance(a, np.ndarray) else ctypes.c_float(a) if isinstance(a, float) else a for a in arguments
    ]
    assert function(form.encode(), *given) == 0


def normed(form: str, x: Array, skip: Array, gamma: Array) -> tuple[Array, Array]:
    total, y = np.empty_like(x), np.empty_like(x)
    elementwise("norm", form, x.size, x, skip, gamma, EPSILON, total, y)
    return total, y


def with_sums(form: str, x: Array, block: int) -> Array:
    sums = np.empty(-(-x.size // block), np.float32)
    elementwise("sums", form, x.size, block, x, sums)
    return np.concatenate([x, sums])


def gated(form: str, both: Array) -> Array:
    gate, up = (part.copy() for part in np.split(both, 2))
    elementwise("gate", form, gate.size, gate, up)
    return gate


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), size=st.integers(1, 200), scale=st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e10]))
def test_what_is_between_products_has_the_same_bits_in_every_form(seed: int, size: int, scale: float) -> None:
    x, skip = rows(2, size, seed) * np.float32(scale)
    gamma, both = rows(1, size, seed + 1)[0], rows(1, 2 * size, seed + 2)[0] * np.float32(scale)
    total, y = normed("plain", x, skip, gamma)
    exact = x.astype(np.float64) + skip
    np.testing.assert_allclose(y, exact / np.sqrt((exact**2).mean() + EPSILON) * gamma, rtol=1e-5, atol=1e-6)
    gate, up = np.split(both.astype(np.float64), 2)
    silu = gate / (1 + np.exp(np.minimum(-gate, 700)))
    np.testing.assert_allclose(gated("plain", both), silu * up, rtol=1e-5, atol=1e-36 * max(1, scale**2))
    for form in here():
        for found, expected in zip(normed(form, x, skip, gamma), (total, y), strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=form)
        np.testing.assert_array_equal(gated(form, both), gated("plain", both), err_msg=form)
        for block in (1, 16, 32, 50):
            np.testing.assert_array_equal(with_sums(form, x, block), with_sums("plain", x, block), err_msg=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_is_none_spoils_its_own_row_only(form: str) -> None:
    if form not in here():
        pytest.skip(f"this processor has no {form}")
    matrix, x = Matrix(2, 40, 200, 64, zeros=True), rows(4, 200)
    expected = product(matrix, form, x)
    for value in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[1, 150] = value
        y = product(matrix, form, spoilt)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_never_depends_on_its_neighbours(threads: int) -> None:
    for matrix in (
        Matrix(3, 700, 576, 64, zeros=True),
        Matrix(3, 700, 576, 0, bits=8),
        Matrix(3, 700, 576, 32, bits=8),
    ):
        made, x = session(matrix, threads=threads), rows(65, 576)
        alone = np.concatenate([made.run(None, {"x": x[None, i : i + 1]})[0][0] for i in range(len(x))])
        for count in (*range(1, 9), 17, 65):
            (y,) = made.run(None, {"x": x[None, :count]})
            np.testing.assert_array_equal(y[0], alone[:count])
            (y,) = made.run(None, {"x": x[:count, None]})
            np.testing.assert_array_equal(y[:, 0], alone[:count])
        np.testing.assert_array_equal(alone, product(matrix, "plain", x))


@pytest.mark.parametrize(
    "matrix", [Matrix(3, 70, 144, 16, zeros=True), Matrix(3, 70, 144, 0, bits=8)], ids=["blocks", "rows"]
)
def test_scales_of_16_bits_are_read_as_they_are(matrix: Matrix) -> None:
    chain, x = Chain(), rows(3, 144)
    chain.product(matrix, "x", "y", cast=True)
    swapped, (node,) = with_own_operators(chain.model(144, "y"))
    assert "yhalf" in node.inputs and b"Cast" not in swapped
    (y,) = opened(swapped).run(None, {"x": x[None]})
    np.testing.assert_array_equal(y[0], product(matrix, "plain", x))


def test_a_scale_of_16_bits_that_is_no_number_spoils_its_output_only() -> None:
    matrix, x = Matrix(3, 40, 64, 32), rows(2, 64)
    expected = product(matrix, "plain", x)
    matrix.scales[3, 1] = np.inf
    chain = Chain()
    chain.product(matrix, "x", "y", cast=True)
    (y,) = opened(with_own_operators(chain.model(64, "y"))[0]).run(None, {"x": x[None]})
    np.testing.assert_array_equal(np.isfinite(y[0]), np.arange(40)[None] != np.array([3, 3])[:, None])
    np.testing.assert_array_equal(np.delete(y[0], 3, 1), np.delete(expected, 3, 1))


def close(found: Array, expected: Array, bound: float) -> None:
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    ("bits", "block"),
    [(bits, block) for bits in BITS for block in BLOCKS if (bits, block) != (2, 16)],  # which it computes in float32
)
def test_products_are_those_of_onnx_runtime_but_for_the_order_of_sums(bits: int, block: int, zeros: bool) -> None:
    matrix = Matrix(4, 100, 5 * block + 14, block, zeros=zeros, bits=bits)
    ours, theirs = session(matrix), session(matrix, own=False)
    for count in (1, 4, 8, 33):
        x = rows(count, matrix.shape[1])[None]
        close(ours.run(None, {"x": x})[0], theirs.run(None, {"x": x})[0], 1e-5)


# Where rows are rounded after what is summed in another order, a code may be another: 1 of 127 of one input.
LAYERS: dict[str, tuple[Matrix, Matrix, bool, float]] = {
    "4 bits": (Matrix(1, 384, 128, 64, zeros=True), Matrix(2, 100, 192, 64, zeros=True), False, 1e-3),
    "8 bits": (Matrix(1, 384, 128, 32, bits=8), Matrix(2, 100, 192, 32, bits=8), False, 1e-3),
    "2 bits": (Matrix(1, 384, 128, 32, bits=2), Matrix(2, 100, 192, 64, bits=2), False, 1e-3),
    "mixed": (Matrix(1, 384, 128, 128), Matrix(2, 100, 192, 32, zeros=True, half=False, bits=8), False, 1e-3),
    "sums of blocks": (Matrix(1, 384, 132, 32, zeros=True), Matrix(2, 100, 198, 32, zeros=True), True, 1e-3),
    "rows": (Matrix(1, 384, 128, 0, bits=8), Matrix(2, 100, 192, 0, bits=8), False, 1e-2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_one_node_is_its_steps_and_close_to_the_graph_that_it_stands_for(name: str) -> None:
    first, last, sums, bound = LAYERS[name]
    chain = layer(first, last, sums=sums)
    graph = chain.model(128, "y", "total")
    swapped, (node,) = with_own_operators(graph)
    assert node.op == "NormGatedMlp"
    ours, theirs, gamma = opened(swapped), opened(graph), chain.tensors["normedgamma"]
    for count in (1, 3, 8, 150):
        x, skip = rows(count, 128), rows(count, 128, seed=5)
        y, total = (found[0] for found in ours.run(None, {"x": x[None], "skip": skip[None]}))
        for found, expected in zip((y, total), theirs.run(None, {"x": x[None], "skip": skip[None]}), strict=True):
            close(found, expected[0], bound)
        for i in range(min(count, 4)):  # bit for bit what the steps give by themselves, alone
            added, row = normed("plain", x[i], skip[i], gamma)
            np.testing.assert_array_equal(total[i], added)
            row = with_sums("plain", row, 32) if sums else row
            row = gated("plain", product(first, "plain", row[None])[0])
            row = with_sums("plain", row, 32) if sums else row
            np.testing.assert_array_equal(y[i], product(last, "plain", row[None])[0])


@pytest.mark.parametrize("products", [(ProductForm(4, 64, zeros=True),), (ProductForm(8, 0),)], ids=str)
@pytest.mark.parametrize("op", ["BlockProduct", "NormProduct"])
def test_the_trial_at_load_finds_them_right(op: str, products: tuple[ProductForm, ...]) -> None:
    assert 0 < own_error(OwnForm(op, products), ALL_ROWS) < OWN_BOUND / 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sums", [0, 32])
def test_the_trial_of_two_products_finds_them_right(bits: int, block: int, sums: int) -> None:
    product = ProductForm(bits, block, zeros=bool(sums), sums=sums)
    for op in ("GatedMlp", "NormGatedMlp"):
        assert 0 < own_error(OwnForm(op, (product, product))) < OWN_BOUND / 2


def test_wrong_shapes_and_inputs_are_refused() -> None:
    matrix = Matrix(5, 40, 128, 64, zeros=True)
    with pytest.raises(Exception, match=r"takes float32 rows of 128 numbers|Got invalid dimensions"):
        session(matrix).run(None, {"x": rows(2, 64)[None]})
    for change, said in (
        ({"codes": matrix.codes[:39]}, r"MatMulNBits.*shape"),  # left to the library, which refuses it
        ({"scales": matrix.scales[:, :1].copy()}, "scales of another shape"),
        ({"zeros": matrix.zeros[:7]}, "zeros of another shape"),
    ):  # type: ignore[index]
        wrong = Matrix(5, 40, 128, 64, zeros=True)
        vars(wrong).update(change)
        with pytest.raises(Exception, match=said):
            session(wrong)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"block_size": 256}, "blocks of 16, 32, 64 and 128 in 2, 3, 4 and 8 bits, not of 256 in 4"),
        ({"bits": 5}, "not of 64 in 5"), ({"bits": 3}, "codes of another shape"), ({"N": 0}, "sizes out of range"),
        ({"block_size": 0, "K": 130}, "multiple of 16"),
        ({"sums": 126}, "no such row has a sum of each block"),
    ],
)  # fmt: skip
def test_sizes_that_no_kernel_has_are_refused(sizes: dict[str, int], said: str) -> None:
    matrix = Matrix(5, 40, 128, 64)
    node = Node("BlockProduct", ["x", "w", "s"], ["y"], matrix.sizes | {"sums": 0, "zeros": 0} | sizes, domain=DOMAIN)
    shapes = {"x": ["rows", matrix.shape[1]]}
    with pytest.raises(Exception, match=said):
        opened(graph_bytes([node], {"x": "float32"}, {"y": "float32"}, tensors=matrix.tensors(), shapes=shapes))


def test_a_library_of_another_interface_is_refused_in_one_line() -> None:
    said: list[bytes] = []
    name = ctypes.create_string_buffer(b"1.16.0")
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda _, text: said.append(text) or 1)
    oldest = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))  # whose first function is all that it takes
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda v: ctypes.addressof(oldest) if v == 1 else None)
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get, version)))
    register = loaded().RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    (line,) = said
    assert line.decode() == (
        "edgellm-kernels needs version 17 of ONNX Runtime's interface, which ONNX Runtime 1.16.0 does not have"
    )


@functools.cache
def bundle() -> Path:
    folder = Path(tempfile.mkdtemp()) / "int4"
    export(attention_model(), folder, text=text_assets(), options=ExportOptions(target="cpu", quantize="int4"))
    return folder


def test_a_bundle_runs_on_them_and_every_check_of_it_holds() -> None:
    model = load(bundle(), kernels="own")
    assert model.session.kernels is not None and model.session.kernels.form == edgellm_kernels.form()
    checks = verify(Bundle(bundle()), open_session(Bundle(bundle()), kernels="own")).checks
    assert [check for check in checks if not check.ok] == []
    assert model.generate("the", max_new_tokens=8).tokens == load(bundle()).generate("the", max_new_tokens=8).tokens


def test_loading_with_them_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    load(bundle(), kernels="own")
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "")


def test_the_profile_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def products() -> dict[str, list[Any]]:
        _, decode = profile(bundle(), prompt_tokens=4, new_tokens=2, rounds=1).phases
        return {op: [k for k in decode.kernels if k.op == op] for op in (*OPERATORS, "MatMulNBits")}

    theirs = products()
    monkeypatch.setenv("EDGELLM_KERNELS", "own")
    ours = products()
    assert theirs["MatMulNBits"] and not any(theirs[op] for op in OPERATORS)
    assert ours["BlockProduct"] and ours["NormGatedMlp"] and not ours["MatMulNBits"]
    own = [kernel for op in OPERATORS for kernel in ours[op]]
    assert all(k.traffic.bytes > 0 and k.layer for k in own)
    operations = [sum(k.traffic.operations for k in kernels) for kernels in (own, theirs["MatMulNBits"])]
    assert operations[0] == operations[1]


def test_wrong_ones_do_not_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EDGELLM_CACHE_DIR", "")  # where it would be noted that they are right
    monkeypatch.setattr(own_trial, "own_error", lambda form: 0.4 * (form.op == "BlockProduct"))
    own_trial._known_error.cache_clear()
    assert load(bundle(), kernels="own").session.kernels is None
    assert re.search(
        r"computes BlockProduct of \d bits in \w+ blocks of \d+ wrong on this processor, by 40%", caplog.text
    )
    own_trial._known_error.cache_clear()
