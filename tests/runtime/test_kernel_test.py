"""The trial of ONNX Runtime's quantized kernels before a bundle runs: right ones pass, wrong ones are named."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import BackendError, load
from edgellm_runtime.backends import kernel_test
from edgellm_runtime.backends.kernel_test import BOUND, KernelForm, forms_in, kernel_error
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.graphs.onnx_file import read_model

FORMS = [
    *(
        KernelForm("MatMulNBits", bits, block, level=4, zeros=zeros)
        for bits in (4, 8) for block in (16, 32, 64, 128) for zeros in (False, True)
    ),
    KernelForm("MatMulNBits", 4, 32, level=0, zeros=True), KernelForm("MatMulNBits", 2, 64, level=4, zeros=True),
    KernelForm("GatherBlockQuantized", 4, 32, zeros=True), KernelForm("GatherBlockQuantized", 8, 64),
    KernelForm("MatMulIntegerToFloat"),
]  # fmt: skip


@functools.cache
def bundle(quantize: str) -> Path:
    folder = Path(tempfile.mkdtemp()) / quantize.replace(":", "-")
    export(attention_model(), folder, text=text_assets(), options=ExportOptions(target="cpu", quantize=quantize))
    return folder


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_that_is_written_is_right_here(form: KernelForm) -> None:
    exact = form.op != "MatMulNBits" or form.level == 0
    assert kernel_error(form) < (1e-6 if exact else BOUND / 2)


@pytest.mark.parametrize(
    ("quantize", "products"),
    [
        ("int8", {KernelForm("MatMulNBits", 8, 32, level=4), KernelForm("GatherBlockQuantized", 8, 32)}),
        ("w8a8", {KernelForm("MatMulIntegerToFloat")}),
        ("none", set()),
    ],
)
def test_the_forms_of_a_bundle_are_found_in_its_graph(quantize: str, products: set[KernelForm]) -> None:
    found = forms_in(read_model((bundle(quantize) / GRAPH).read_bytes()))
    assert products <= found if products else found == products


def test_a_wrong_kernel_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    right, folder = kernel_test.packed_codes, bundle("int4")
    kernel_test._known_error.cache_clear()
    monkeypatch.setattr(
        kernel_test, "packed_codes", lambda codes, bits: right(codes[:, ::-1] if bits == 4 else codes, bits)
    )
    with pytest.raises(
        BackendError, match=r"computes MatMulNBits of 4 bits in \w+ blocks of \d+ wrong .* --quantize int8"
    ):
        load(folder)
    monkeypatch.setattr(kernel_test, "packed_codes", right)
    kernel_test._known_error.cache_clear()
    model = load(folder)
    assert model.generate("the", max_new_tokens=2).tokens
    (check,) = (c for c in verify(Bundle(folder), model.session).checks if c.name == "kernels")
    assert check.ok and 0 < check.value < BOUND
    monkeypatch.setattr(kernel_test, "packed_codes", lambda codes, bits: right(codes[:, ::-1], bits))
    assert not verify(Bundle(folder), model.session).ok


def test_what_was_found_right_is_remembered_for_the_graph_and_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, tried = bundle("int8"), []
    kernel_test._known_error.cache_clear()

    def counted(form: KernelForm, rows: tuple[int, ...]) -> float:
        tried.append(form)
        return 0.0

    monkeypatch.setenv("EDGELLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_test, "kernel_error", counted)
    load(folder)
    assert tried
    tried.clear()
    kernel_test._known_error.cache_clear()
    load(folder)
    assert not tried
    monkeypatch.setattr(kernel_test, "processor", lambda: "another")
    load(folder)
    assert tried
