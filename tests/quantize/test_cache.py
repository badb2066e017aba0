"""Keys and values in 8 bits: what is stored, what it costs in quality, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, VOCAB, make

from edgellm.cli.quantization_text import cache_rows
from edgellm.models.decoder import Decoder
from edgellm.models.protocol import Step, empty_state
from edgellm_exporters.errors import ExportError, QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.quantize.cache import cache_scales
from edgellm_runtime import StateSpec, open_session

WITH_ATTENTION = [
    "attention", "attention without positions", "mixed", "decoder", "decoder untied with biases",
    "decoder with q/k norm", "local and mixed", "memory",
]  # fmt: skip


@pytest.mark.parametrize("method", ["none", "int8"])
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_an_8_bit_cache_stays_near_pytorch_at_a_quarter_of_the_memory(family: str, method: str, tmp_path: Path) -> None:
    model = make(family)
    narrow = export(model, tmp_path / "n", options=ExportOptions(quantize=method, kv_cache="int8"))
    wide = export(model, tmp_path / "w", options=ExportOptions(quantize=method))
    assert narrow.verification.ok
    caches = [spec for spec in narrow.bundle.manifest.signature.state if spec.update == "append"]
    assert {spec.dtype for spec in caches} == {"int8"}
    assert ("state" in narrow.bundle.manifest.bounds) == (len(caches) < len(model.state_specs()))
    session = open_session(narrow.bundle, threads=1)
    sizes = [
        sum(s.nbytes(1, 64) for s in x.bundle.manifest.signature.state if s.update == "append") for x in (narrow, wide)
    ]
    assert sizes[0] * 4 == sizes[1]
    window = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()
    report = compare(model, session, [window])
    assert report.kl < 5e-3
    assert report.kl > compare(model, open_session(wide.bundle, threads=1), [window]).kl * 0.5


def test_the_cache_holds_the_codes_of_what_pytorch_keeps(tmp_path: Path) -> None:
    model = make("decoder")
    exported = export(model, tmp_path / "b", options=ExportOptions(kv_cache="int8"))
    session = open_session(exported.bundle, threads=1)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 40))
    state = session.new_state(1, 40)
    session.step(tokens, state)
    with torch.no_grad():
        whole = torch.from_numpy(tokens)
        _, expected = model(whole, empty_state(model, 1, 40), Step.whole(whole))
    rows = golden_rows(None, VOCAB, CONTEXT).rows  # what the export saw
    for name, scale in cache_scales(model, ["layers.0.k", "layers.0.v"], {}, rows).items():
        codes = state.tensors[name][0][:, :40].astype(np.int64)  # (heads, slots in use, head_dim)
        exact = expected[name][0].numpy() / scale.reshape(2, 1, -1)
        assert np.abs(codes - np.clip(np.rint(exact), -128, 127)).max() <= 1  # a tie may go either way
        assert (codes == np.clip(np.rint(exact), -128, 127)).mean() > 0.99


def test_states_that_no_kernel_holds_in_8_bits_stay_float_and_are_named(tmp_path: Path) -> None:
    expected = {
        "local and mixed": ["blocks.2.k", "blocks.2.v"],
        "memory": ["attention.k", "attention.v"],
    }
    for family, names in expected.items():
        made = export(make(family), tmp_path / family.replace(" ", "-"), options=ExportOptions(kv_cache="int8"))
        said = made.bundle.manifest.quantization
        assert said["cache"] == names
        left = {s.name: f"update {s.update}" for s in make(family).state_specs() if s.update in ("ring", "static")}
        assert said["cache_left"] == left
        dtypes = {s.name: s.dtype for s in made.bundle.manifest.signature.state}
        assert {name for name, dtype in dtypes.items() if dtype == "int8"} == set(names)
        [(_, shown)] = cache_rows(said)  # a line of the summary
        assert all(f"{name} ({why})" in shown for name, why in list(left.items())[:2])
        assert shown.startswith(f"2 of {2 + len(left)} states; not ")


class Watching(Decoder):
    """A decoder whose logits look at a cache of its first layer, beside the attention that keeps it."""

    key = "layers.0.v"

    def forward(self, tokens: Any, state: Any = None, step: Any = None) -> Any:
        logits, present = super().forward(tokens, state, step)
        seen = (state or {}).get(self.key)
        return (logits if seen is None else logits + 0 * seen.sum()), present


class Owned(Decoder):
    """A decoder with a cache that no op knows: it is appended to by PyTorch's own operators."""

    def state_specs(self) -> list[StateSpec]:
        return [*super().state_specs(), StateSpec("own", ("batch", "capacity", 4), "float32", "append")]

    def forward(self, tokens: Any, state: Any = None, step: Any = None) -> Any:
        logits, present = super().forward(tokens, state, step)
        if not state:
            return logits, present
        slots = (step.past_lengths.long()[:, None] + torch.arange(tokens.shape[1]))[..., None].expand(-1, -1, 4)
        new = state["own"].scatter(1, slots, tokens[..., None].expand(-1, -1, 4).float())
        return logits, present | {"own": new}


@pytest.mark.parametrize(
    ("kind", "left"), [(Watching, ["layers.0.k", "layers.0.v"]), (Owned, ["own"])], ids=["watched", "own"]
)
def test_a_cache_that_others_read_or_write_stays_float_with_its_fellow(
    kind: type[Decoder], left: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind(make("decoder").config).eval()
    made = export(model, tmp_path / "b", options=ExportOptions(kv_cache="int8"))
    assert made.verification.ok
    said = made.bundle.manifest.quantization
    assert said["cache_left"] == dict.fromkeys(left, "not a cache of Attention alone")
    assert said["cache"] == sorted(s.name for s in model.state_specs() if s.name not in left)


def test_an_8_bit_cache_adds_no_bound_that_its_method_does_not_have(tmp_path: Path) -> None:
    options = ExportOptions(quantize="int4", kv_cache="int8")
    assert "state" not in export(make("mixed"), tmp_path / "b", options=options).bundle.manifest.bounds


def test_a_longer_text_widens_the_scales() -> None:
    model = make("decoder")
    rng = np.random.default_rng(0)
    few = cache_scales(model, ["layers.1.k"], {}, rng.integers(0, VOCAB, (1, 4)).tolist())["layers.1.k"]
    many = cache_scales(model, ["layers.1.k"], {}, rng.integers(0, VOCAB, (8, 60)).tolist())["layers.1.k"]
    assert few.shape == (2 * 32,)
    assert (many > few).mean() > 0.9


@pytest.mark.parametrize(
    ("family", "options", "error", "said"),
    [
        ("lstm", {"kv_cache": "int8"}, QuantizeError, "keeps no keys and values"),
        (
            "local",
            {"kv_cache": "int8"},
            QuantizeError,
            r"no state can be kept in fewer bits: blocks.0.k \(update ring\), .*; leave the cache's precision out",
        ),
        (
            "decoder",
            {"kv_cache": "int8", "target": "onnx"},
            ExportError,
            "target onnx keeps keys and values in float32",
        ),
        ("decoder", {"kv_cache": "int4"}, ExportError, "float32 or float16 or int8, not 'int4'"),
    ],
)
def test_an_impossible_cache_is_refused(
    family: str, options: dict[str, str], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        export(make(family), tmp_path / "b", options=ExportOptions(**options))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
