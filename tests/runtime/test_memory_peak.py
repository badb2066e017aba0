"""The peak of memory that is predicted before loading, beside what a fresh process has taken."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_bundles import attention_bundle, recurrent_bundle

from edgellm.cli.inspect import inspect
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.state.memory_peak import LIBRARIES, memory_peak

CHILD = """
import sys
import numpy as np
from edgellm_runtime import load
from edgellm_runtime.checks.memory import peak_rss_mb
model = load(sys.argv[1], threads=1)
state = model.session.new_state(1, int(sys.argv[2]))
model.session.step(np.ones((1, int(sys.argv[2])), dtype=np.int64), state)
print(peak_rss_mb())
"""


@functools.cache
def measured(folder: Path, tokens: int) -> float:
    """The most bytes that a process has taken."""
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tokens)], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return float(found.stdout) * 2**20


@functools.cache
def larger_bundle() -> Path:
    """27 million weights in float32, without text."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=4096, width=768, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=128, mlp_width=2048,
        max_context=512,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(), "bundle")
    export(Decoder(config).eval(), folder, options=ExportOptions(target="cpu"))
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


def test_inspect_shows_the_peak() -> None:
    result = CliRunner().invoke(inspect, [str(attention_bundle()), "--context", "10"], env={"COLUMNS": "400"})
    (row,) = (line for line in result.output.splitlines() if "peak, 10 tokens" in line)
    assert str(memory_peak(Bundle(attention_bundle()), 10)) in row
