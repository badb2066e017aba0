"""Each layer's output keeps a name in the graph, and is held to PyTorch's; the first that is off is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, make
from mutations import Numbers
from tiny_files import copied

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.layers import layer_modules, layers_recorded
from edgellm_exporters.proof.layer_bounds import typical_distance
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.layers import layer_difference, sampled_layer, tapped
from edgellm_runtime.checks.verify import Check, verify

ROW = np.random.default_rng(5).integers(0, VOCAB, 30)


def checked(path: Path) -> dict[str, Check]:
    bundle = Bundle(path)
    return {check.name: check for check in verify(bundle, open_session(bundle, threads=1)).checks}


@pytest.mark.parametrize(
    "family", ["mixed", "decoder", "windows and soft caps", "state space", "short convolutions with biases"]
)  # fmt: skip
def test_every_layer_of_a_bundle_gives_what_it_gives_in_pytorch(family: str, tmp_path: Path) -> None:
    model = make(family)
    bundle = export(model, tmp_path / "b").bundle
    assert list(bundle.manifest.layers) == list(layer_modules(model))
    outputs = tapped(bundle).read(ROW)[1]
    with torch.no_grad(), layers_recorded(model) as expected:
        model(torch.from_numpy(ROW)[None], {})
    for path, output in outputs.items():
        assert typical_distance(expected[path][0].numpy(), output) < 1e-5
    assert checked(tmp_path / "b")["layers"].ok


@pytest.mark.parametrize(("method", "layer"), [("none", 0), ("int8", 1), ("int4", 0)])
def test_the_first_layer_that_is_off_is_named(method: str, layer: int, tmp_path: Path) -> None:
    source = export(make("decoder"), tmp_path / "source", options=ExportOptions(quantize=method)).bundle.path
    numbers = Numbers(copied(source, tmp_path))
    gain = next(n for n in numbers.names(lambda n, shape: n.startswith(f"layers.{layer}.") and "norm" in n))
    numbers.put(gain, numbers.get(gain) * 1.5)
    numbers.write()
    found = checked(tmp_path / "bundle")["layers"]
    assert not found.ok
    assert f"off is layers.{layer};" in found.what


def test_samples_find_a_token_that_is_off_and_shapes_that_do_not_fit() -> None:
    output = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    golden = sampled_layer(output)
    assert layer_difference(golden, output) < 1e-12
    other = output.copy()
    other[7] *= 1.1
    assert layer_difference(golden, other) == pytest.approx(0.1, rel=0.1)
    assert np.isnan(layer_difference(golden, output[:11]))
    assert np.isnan(layer_difference(golden, output[:, :3]))
