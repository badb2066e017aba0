"""The peak of memory that is predicted before loading, beside what a fresh process has taken."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from tiny_bundles import attention_bundle, copied, recurrent_bundle, sign

from edgellm.cli.inspect import inspect
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.memory import memory_now_and_at_most, peak_rss_mb
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.state.memory_peak import LIBRARIES, memory_peak

UINT8, FLOAT16 = 2, 10  # as onnx.proto numbers them
CHILD = """
import ctypes
import sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which round up what is small where the system has some to give
import numpy as np
from edgellm_runtime import load
from edgellm_runtime.checks.memory import peak_rss_mb
model = load(sys.argv[1], threads=1, kernels=sys.argv[3])
state = model.session.new_state(1, int(sys.argv[2]))
model.session.step(np.ones((1, int(sys.argv[2])), dtype=np.int64), state)
print(peak_rss_mb())
"""


@functools.cache
def measured(folder: Path, tokens: int, kernels: str = "onnxruntime", caches: Path | None = None) -> float:
    """The most bytes that a process has taken; without caches it tries the kernels first, as on a new machine."""
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tokens), kernels], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "EDGELLM_CACHE_DIR": str(caches or "")},
    )  # fmt: skip
    return float(found.stdout) * 2**20


@functools.cache
def larger_bundle(quantize: str = "none") -> Path:
    """27 million weights, without text."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, width=768, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=128, mlp_width=2048,
        max_context=512,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(), "bundle")
    loose = {} if quantize == "none" else {"kl": 100.0, "top1": 0.0}
    export(Decoder(config).eval(), folder, options=ExportOptions(target="cpu", quantize=quantize, bounds=loose))
    return folder


only_linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's peak")


@only_linux
@pytest.mark.parametrize(
    ("bundle", "tokens"), [(attention_bundle, 90), (recurrent_bundle, 90), (larger_bundle, 500)],
    ids=["attention", "recurrent", "larger"],
)  # fmt: skip
def test_the_peak_is_predicted_within_a_fifth(bundle: Any, tokens: int) -> None:
    predicted, most = memory_peak(Bundle(bundle()), tokens), measured(bundle(), tokens)
    assert abs(predicted.total - most) < 0.2 * most, (str(predicted), most)


@only_linux
def test_what_a_larger_model_takes_more_is_predicted_within_a_quarter() -> None:
    more = measured(larger_bundle(), 500) - measured(attention_bundle(), 90)
    predicted = memory_peak(Bundle(larger_bundle()), 500)
    assert more > 2**26
    assert abs(predicted.total - LIBRARIES - more) < 0.25 * more, (str(predicted), more)


@functools.cache
def quantized_bundle() -> Path:
    """A table that is looked up and multiplied with, in 8 bits, and layers in 4: scales are of 16 bits."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, width=512, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=512,
        max_context=128, tie_embeddings=True,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(), "bundle")
    export(Decoder(config).eval(), folder, options=ExportOptions(target="cpu", quantize="int4"))
    return folder


def test_with_own_kernels_scales_keep_their_16_bits_and_a_table_stays_in_its_file() -> None:
    bundle = Bundle(quantized_bundle())
    tensors = read_model(bundle.file("model.onnx").read_bytes())["graph"]["initializer"]
    sizes = {t["name"].decode(): (t["data_type"], math.prod(t["dims"])) for t in tensors if "external_data" in t}
    codes = [count for kind, count in sizes.values() if kind == UINT8]
    scales = [count for kind, count in sizes.values() if kind == FLOAT16]
    table = 4096 * 512
    assert codes.count(table) == 2  # looked up, and multiplied with
    theirs, own = memory_peak(bundle, 100), memory_peak(bundle, 100, kernels="own")
    assert theirs.weights - own.weights == 4 * sum(scales) + table
    assert (theirs.loading, own.loading) == (table, 1 << 20)
    assert (theirs.state, theirs.text) == (own.state, own.text)
    assert 0 < own.scratch <= theirs.scratch  # scores of attention are not kept


def test_a_table_that_is_cast_before_it_is_looked_up_is_counted_too(tmp_path: Path) -> None:
    folder = copied(quantized_bundle(), tmp_path)
    model = onnx.load_model(folder / "model.onnx", load_external_data=False)
    place, gather = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "GatherBlockQuantized")
    model.graph.node.insert(place, onnx.helper.make_node("Cast", [gather.input[0]], ["table"], to=UINT8))
    gather.input[0] = "table"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    sign(folder, "model.onnx")
    plain, changed = (memory_peak(Bundle(path), 10, kernels="own") for path in (quantized_bundle(), folder))
    assert changed.weights > plain.weights  # it does not stay in its file


@only_linux
def test_the_peak_with_own_kernels_is_predicted_within_a_fifth() -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    predicted, most = (
        memory_peak(Bundle(quantized_bundle()), 90, kernels="own"),
        measured(quantized_bundle(), 90, "own"),
    )
    assert abs(predicted.total - most) < 0.2 * most, (str(predicted), most)


@only_linux
@pytest.mark.parametrize("kernels", ["onnxruntime", "own"])
def test_of_codes_of_3_bits_it_is_predicted_within_a_fifth(kernels: str) -> None:
    if kernels == "own":
        pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    folder = larger_bundle("3:64:asymmetric")
    predicted, most = memory_peak(Bundle(folder), 90, kernels=kernels), measured(folder, 90, kernels)
    assert abs(predicted.total - most) < 0.2 * most, (str(predicted), most)


@only_linux
def test_trying_own_kernels_takes_next_to_nothing_beside_what_follows(tmp_path: Path) -> None:
    pytest.importorskip("edgellm_kernels", reason="edgellm-kernels is not built; make kernels builds it")
    folder = larger_bundle("3:64:asymmetric")
    measured(folder, 91, "own", tmp_path)
    assert any(tmp_path.iterdir())  # it is known from here on that they are right
    tried, known = measured(folder, 90, "own"), measured(folder, 90, "own", tmp_path)
    assert tried - known < 12 * 2**20, (tried, known)


def test_inspect_shows_the_peak() -> None:
    result = CliRunner().invoke(inspect, [str(attention_bundle()), "--context", "10"], env={"COLUMNS": "400"})
    (row,) = (line for line in result.output.splitlines() if "peak, 10 tokens" in line)
    assert str(memory_peak(Bundle(attention_bundle()), 10)) in row


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not say")
def test_what_a_process_holds_is_at_most_what_it_has_held() -> None:
    now, most = memory_now_and_at_most()
    assert 10 << 20 < now <= most
    assert most <= (peak_rss_mb() or 0) * 2**20 + 2**20
