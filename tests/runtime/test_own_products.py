"""The library of edgellm's own kernels: the same bits in every form and for every neighbour, as the reference says."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load, open_session
from edgellm_runtime.backends import kernel_test
from edgellm_runtime.backends.kernel_test import ALL_ROWS, BOUND, KernelForm, kernel_error
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_kernels import DOMAIN, OP, find
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.profile import profile
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.graphs.writer import Node, graph_bytes

edgellm_kernels = pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")

Array = NDArray[Any]
FORMS = ("avx512-vnni", "avx2", "neon-dotprod", "plain")
BLOCKS = (16, 32, 64, 128)


@functools.cache
def loaded() -> Any:
    return ctypes.CDLL(str(edgellm_kernels.library()))


def here() -> list[str]:
    return [form for form in FORMS if loaded().edgellm_has_form(form.encode())]


class Matrix:
    """Random codes, scales and zeros as MatMulNBits has them; scales are float16's, or need float32."""

    def __init__(self, seed: int, outputs: int, inputs: int, block: int, *, zeros: bool, half: bool) -> None:
        draw, self.block, self.shape = np.random.default_rng(seed), block, (outputs, inputs)
        blocks = -(-inputs // block)
        self.codes = draw.integers(0, 256, (outputs, blocks, block // 2), dtype=np.uint8)
        scales = draw.uniform(-0.02, 0.02, (outputs, blocks)).astype(np.float32)
        scales[0, 0] = 3e-7  # a float16 below the normal ones
        self.scales = scales.astype(np.float16).astype(np.float32) if half else scales
        self.zeros = draw.integers(0, 256, (outputs, (blocks + 1) // 2), dtype=np.uint8) if zeros else None

    def weights(self) -> tuple[Array, Array]:
        """Codes less zeros (outputs, blocks, block), whole numbers, and scales (outputs, blocks)."""
        whole = np.stack([self.codes & 15, self.codes >> 4], -1).reshape(*self.codes.shape[:2], -1).astype(np.int64)
        if self.zeros is None:
            return whole - 8, self.scales
        zeros = np.stack([self.zeros & 15, self.zeros >> 4], -1).reshape(len(self.zeros), -1)[:, : whole.shape[1]]
        return whole - zeros[..., None], self.scales

    def product(self, form: str, x: Array) -> Array:
        """By a form of the library, without ONNX Runtime."""
        outputs, inputs = self.shape
        y = np.full((len(x), outputs), 7, np.float32)
        zeros = None if self.zeros is None else self.zeros.ctypes.data_as(ctypes.c_void_p)
        failed = loaded().edgellm_product(
            form.encode(), len(x), outputs, inputs, self.block, np.ascontiguousarray(x).ctypes.data_as(ctypes.c_void_p),
            self.codes.ctypes.data_as(ctypes.c_void_p), self.scales.ctypes.data_as(ctypes.c_void_p), zeros,
            y.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        assert not failed
        return y

    def session(self, domain: str, op: str, threads: int = 2) -> Any:
        """Of ONNX Runtime, with one node."""
        ort, (outputs, inputs) = library(), self.shape
        sizes = {"bits": 4, "block_size": self.block, "N": outputs, "K": inputs, "accuracy_level": 4}
        tensors = {"w": self.codes, "s": self.scales} | ({} if self.zeros is None else {"z": self.zeros})
        node = Node(op, ["x", *tensors], ["y"], sizes, domain=domain)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        if domain == DOMAIN:
            find(ort).add_to(options)
        shapes = {"x": ["batch", "time", inputs]}
        graph = graph_bytes([node], {"x": "float32"}, {"y": "float32"}, tensors=tensors, shapes=shapes)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def rows(count: int, inputs: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((count, inputs)).astype(np.float32)


def reference(matrix: Matrix, x: Array) -> Array:
    """What product.h states, in NumPy. A float64 holds the product of two float32 exactly, its sum nearly always."""
    codes, scales = matrix.weights()
    blocks = codes.shape[1]
    padded = np.pad(x, ((0, 0), (0, blocks * matrix.block - x.shape[1]))).reshape(len(x), blocks, matrix.block)
    top = np.abs(padded).max(-1)
    rounded = np.rint(padded * (np.float32(127) / top)[..., None]).astype(np.int64)
    assert rounded.dtype == np.int64 and np.abs(rounded).max() == 127
    whole = np.einsum("rbi,obi->rob", rounded, codes)
    y = np.zeros((len(x), len(codes)), np.float32)
    for b in range(blocks):
        both = scales[:, b] * (top[:, b, None] / np.float32(127))
        y = (whole[..., b].astype(np.float64) * both.astype(np.float64) + y).astype(np.float32)
    return y


def test_this_processor_has_a_form() -> None:
    assert edgellm_kernels.form() in here()
    assert here()[-1] == "plain"


@pytest.mark.parametrize("half", [True, False], ids=["float16 scales", "float32 scales"])
@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_form_gives_the_bits_of_the_reference(block: int, zeros: bool, half: bool) -> None:
    for outputs, inputs in ((33, 3 * block), (70, 2 * block + 18), (32, block), (5, 7)):
        matrix, x = Matrix(1, outputs, inputs, block, zeros=zeros, half=half), rows(9, inputs)
        plain = matrix.product("plain", x)
        np.testing.assert_allclose(plain, reference(matrix, x), rtol=1e-6, atol=1e-7)
        for form in here():
            np.testing.assert_array_equal(matrix.product(form, x), plain, err_msg=form)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000), outputs=st.integers(1, 80), inputs=st.integers(1, 300), block=st.sampled_from(BLOCKS),
    count=st.integers(1, 9), zeros=st.booleans(), half=st.booleans(), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)  # fmt: skip
def test_forms_agree_on_any_shape(
    seed: int, outputs: int, inputs: int, block: int, count: int, zeros: bool, half: bool, size: float
) -> None:
    matrix = Matrix(seed, outputs, inputs, block, zeros=zeros, half=half)
    x = rows(count, inputs, seed) * np.float32(size)
    x[0, :: 1 + seed % 3] = 0
    plain = matrix.product("plain", x)
    for form in here():
        np.testing.assert_array_equal(matrix.product(form, x), plain, err_msg=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_that_is_none_spoils_its_own_row_only(form: str) -> None:
    if form not in here():
        pytest.skip(f"this processor has no {form}")
    matrix, x = Matrix(2, 40, 200, 64, zeros=True, half=True), rows(4, 200)
    expected = matrix.product(form, x)
    for value in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[1, 150] = value
        y = matrix.product(form, spoilt)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_never_depends_on_its_neighbours(threads: int) -> None:
    matrix = Matrix(3, 700, 576, 64, zeros=True, half=True)
    session, x = matrix.session(DOMAIN, OP, threads), rows(65, 576)
    alone = np.concatenate([session.run(None, {"x": x[None, i : i + 1]})[0][0] for i in range(len(x))])
    for count in (*range(1, 9), 17, 65):
        (y,) = session.run(None, {"x": x[None, :count]})
        np.testing.assert_array_equal(y[0], alone[:count])
        (y,) = session.run(None, {"x": x[:count, None]})
        np.testing.assert_array_equal(y[:, 0], alone[:count])
    np.testing.assert_array_equal(alone, matrix.product("plain", x))


@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("block", BLOCKS)
def test_products_are_those_of_onnx_runtime_but_for_the_order_of_sums(block: int, zeros: bool) -> None:
    matrix = Matrix(4, 100, 5 * block + 14, block, zeros=zeros, half=True)
    ours, theirs = matrix.session(DOMAIN, OP), matrix.session("com.microsoft", "MatMulNBits")
    for count in (1, 4, 8, 33):
        x = rows(count, matrix.shape[1])[None]
        y, expected = (session.run(None, {"x": x})[0] for session in (ours, theirs))
        assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("zeros", [True, False], ids=["asymmetric", "symmetric"])
def test_the_trial_at_load_finds_them_right(block: int, zeros: bool) -> None:
    assert 0 < kernel_error(KernelForm(OP, 4, block, level=4, zeros=zeros), ALL_ROWS) < BOUND / 2


def test_wrong_shapes_and_inputs_are_refused() -> None:
    matrix = Matrix(5, 40, 128, 64, zeros=True, half=True)
    with pytest.raises(Exception, match=r"takes float32 rows of 128 numbers|Got invalid dimensions"):
        matrix.session(DOMAIN, OP).run(None, {"x": rows(2, 64)[None]})
    for change, said in (({"codes": matrix.codes[:39]}, "codes of another shape"),
                         ({"scales": matrix.scales[:, :1].copy()}, "scales of another shape"),
                         ({"zeros": matrix.zeros[:7]}, "zeros of another shape"),  # type: ignore[index]
                         ({"block": 256}, "blocks of 16, 32, 64 and 128, not of 256")):  # fmt: skip
        wrong = Matrix(5, 40, 128, 64, zeros=True, half=True)
        vars(wrong).update(change)
        with pytest.raises(Exception, match=said):
            wrong.session(DOMAIN, OP)


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


def test_the_profile_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def products() -> dict[str, list[Any]]:
        _, decode = profile(bundle(), prompt_tokens=4, new_tokens=2, rounds=1).phases
        return {op: [k for k in decode.kernels if k.op == op] for op in (OP, "MatMulNBits")}

    theirs = products()
    monkeypatch.setenv("EDGELLM_KERNELS", "own")
    ours = products()
    assert ours[OP] and not theirs[OP]
    assert len(ours[OP]) + len(ours["MatMulNBits"]) == len(theirs["MatMulNBits"])
    assert all(k.traffic.bytes > 0 and k.layer for k in ours[OP])


def test_wrong_ones_do_not_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("EDGELLM_CACHE_DIR", "")  # where it would be noted that they are right
    right = kernel_test.kernel_error
    monkeypatch.setattr(kernel_test, "kernel_error", lambda form, *rest: 0.4 if form.op == OP else right(form, *rest))
    kernel_test._known_error.cache_clear()
    assert load(bundle(), kernels="own").session.kernels is None
    assert "computes MatMul4Bits of 4 bits in asymmetric blocks of" in caplog.text
    kernel_test._known_error.cache_clear()
