"""A product made some rows of its weight at a time is the product; the codes of its parts stay where they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import make

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.backends.ort import library
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.checks.far import FAR, far_golden, far_outputs, float_session
from edgellm_runtime.checks.goldens import goldens_file
from edgellm_runtime.graphs.external_files import stored_tensors
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model
from edgellm_runtime.graphs.product_parts import with_product_parts


@pytest.fixture(scope="module", params=["int4", "int8", "4:64:asymmetric", "4:64:asymmetric:scales8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("parts") / "b"
    return export(make("decoder"), folder, options=ExportOptions(quantize=request.param)).bundle


def test_a_product_in_parts_gives_the_same_logits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (1 << 30, 10_240):
        monkeypatch.setattr("edgellm_runtime.graphs.float_inputs.WIDENED_BYTES", most)
        session = float_session(bundle, 1)
        far = far_golden(goldens_file(bundle)[FAR], session.width, session)
        found.append(far_outputs(session, far, "whole")[0])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_parts_read_the_codes_where_they_are(bundle: Bundle) -> None:
    graph = bundle.file(GRAPH).read_bytes()
    parted = with_product_parts(graph, 10_240)
    before, after = ({t.name: t for t in stored_tensors(read_model(data))} for data in (graph, parted))
    products = [n for n in nodes_of(read_model(parted)) if n["op_type"] == b"MatMulNBits"]
    sizes = [{a["name"]: a["i"] for a in n["attribute"]} for n in products]
    assert all(4 * size[b"N"] * size[b"K"] <= 10_240 for size in sizes)
    assert after.items() >= before.items()
    for name in {name.rpartition(".")[0] for name in after.keys() - before.keys()}:
        parts = sorted(
            (t.offset, t.nbytes) for n, t in after.items() if n.rpartition(".")[0] == name and n not in before
        )
        ends = [offset + size for offset, size in parts]
        assert [offset for offset, _ in parts] == [before[name].offset, *ends[:-1]]
        assert ends[-1] == before[name].offset + before[name].nbytes


def test_a_graph_of_small_products_stays_as_it_is(bundle: Bundle) -> None:
    graph = bundle.file(GRAPH).read_bytes()
    assert with_product_parts(graph) == graph


def test_the_library_runs_parts_from_a_file_beside_the_graph(bundle: Bundle, tmp_path: Path) -> None:
    ort, options = library(), library().SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    parted = with_product_parts(bundle.file(GRAPH).read_bytes(), 10_240)
    assert ort.InferenceSession(parted, options, providers=["CPUExecutionProvider"]).get_outputs()
