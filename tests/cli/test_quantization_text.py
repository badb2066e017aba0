"""What inspect shows of how a bundle was quantized, whoever wrote the manifest."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm.cli.quantization_text import quantization_rows


def test_formats_are_counted_and_states_are_not_listed() -> None:
    said = {
        "method": "auto", "rounding": "GPTQ", "weights": {"8-bit block 32": 1, "4-bit block 64": 120},
        "held_out": {"tokens": 2048, "kl": 0.0253992}, "cache": ["a.k", "a.v"], "cache_left": {"b": "update ring"},
    }  # fmt: skip
    assert quantization_rows(said) == [
        ("quantization", "auto: 1 in 8-bit block 32; 120 in 4-bit block 64"),
        ("  rounding", "GPTQ"),
        ("  held out", '{"tokens": 2048, "kl": 0.0254}'),
        ("keys and values in 8 bits", "2 of 3 states; not b (update ring)"),
    ]


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ({}, [("quantization", "none")]),
        ({"method": ["x"], "weights": [1]}, [("quantization", "['x']"), ("  weights", "[1]")]),
        ({"method": "m", "cache": 3}, [("quantization", "m")]),
        ({"method": "m", "cache": ["k"], "cache_left": "all"}, [("quantization", "m")]),
    ],
)
def test_a_manifest_of_somebody_else_breaks_nothing(said: dict[str, Any], rows: list[tuple[str, str]]) -> None:
    assert quantization_rows(said) == rows
