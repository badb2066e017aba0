"""Some spoiled bundles, states and checkpoints: each works or is refused in a sentence; none crashes, hangs or grows.

``make fuzz`` runs as many as it is given time for.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from fuzzing import make_source, run_cases
from fuzzing_checkpoints import gguf_fields, make_checkpoints
from gguf import GGUFReader

from edgellm.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")


def test_what_is_spoiled_works_or_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    failures = list(run_cases(make_source(tmp_path / "source"), tmp_path, 0, 160))
    assert not failures, "\n".join(f"case {f.number}: {f.what}" for f in failures)


def test_a_gguf_header_is_walked_to_its_end(tmp_path: Path) -> None:
    make_checkpoints(tmp_path)
    data = (tmp_path / "checkpoint-gguf-Q8_0/model.gguf").read_bytes()
    at, form = gguf_fields(data)[-1]  # where the last tensor begins
    (begins,) = struct.unpack_from(form, data, at)
    last = GGUFReader(tmp_path / "checkpoint-gguf-Q8_0/model.gguf").tensors[-1]
    aligned = -(at + 8) % 32 + at + 8
    assert last.data_offset == aligned + begins


def test_what_a_checkpoint_says_is_quoted_in_part() -> None:
    said = str(CheckpointError(f"config.json: hidden_size is {'9' * 70_000}; correct it"))
    assert len(said) < 2000
    assert said.startswith("config.json: hidden_size is 999")
    assert said.endswith("9; correct it")
