"""The first layer whose engines are wrong, where their graphs are right: found by building a few of its beginnings."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families import make
from onnx import helper
from source_models import t5_model

from edgellm.cli.diff_rows import rows_to_read, sources_to_read
from edgellm_exporters.engines.bisect import LOGITS, bisect_engines, built_with
from edgellm_exporters.engines.cut import cut_behind
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import BackendError, BundleError, OptionError, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.layers import tapped
from edgellm_runtime.session import Session

LAYERS = [f"blocks.{number}" for number in range(5)]  # attention, LSTM, GRU and RNN, in one model
ROW = list(range(1, 15))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    engine = EngineOptions(build=False, max_batch=1, chunk=8, max_context=48)
    options = ExportOptions(target="tensorrt", dtype="float16", engine=engine)
    return export(make("mixed"), tmp_path_factory.mktemp("mixed") / "b", options=options).bundle


class WrongEngines:
    """Engines that compute their graphs, by ONNX Runtime, but for one value that is never negative.

    Args:
        value: its name in the graphs.
        scratch: where the graphs that the engines really compute are written.
    """

    def __init__(self, value: str, scratch: Path) -> None:
        self.value, self.scratch, self.opened, self.built = value, scratch, 0, 0

    def build(self, part: Bundle) -> Bundle:
        self.built += 1
        return part

    def run(self, part: Bundle) -> Session:
        self.opened += 1
        copy = self.scratch / f"engine-{self.opened}"
        copy.mkdir()
        for file in part.path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        for info in part.manifest.graphs.values():
            model = onnx.load(str(copy / info.file), load_external_data=False)
            self._spoil(model.graph)
            (copy / info.file).write_bytes(model.SerializeToString())
        spoiled = Bundle.__new__(Bundle)
        spoiled.__dict__.update(part.__dict__)
        spoiled._root = spoiled.path = copy
        return open_session(spoiled, device="cpu", threads=1)

    def _spoil(self, graph: Any) -> None:
        for place, node in enumerate(graph.node):
            if self.value in node.output:
                node.output[list(node.output).index(self.value)] = "right"
                graph.node.insert(place + 1, helper.make_node("Relu", ["right"], [self.value]))
                return


@pytest.mark.parametrize("wrong", [*LAYERS, LOGITS, ""])
def test_each_layer_in_turn_is_named_and_none_where_the_engines_are_right(
    wrong: str, bundle: Bundle, tmp_path: Path
) -> None:
    value = {LOGITS: "logits.narrow", "": "no such value"}.get(wrong, f"layer/{wrong}")
    engines = WrongEngines(value, tmp_path)
    found = bisect_engines(bundle, [ROW], engines.run, engines.build)
    assert found.wrong == (wrong or None)
    assert found.trials[0].name == LOGITS
    assert engines.built == len(found.trials) - 1 <= math.ceil(math.log2(len(LAYERS) + 1))
    assert (engines.built == 0) == (wrong == "")


def test_a_cut_bundle_gives_what_the_layer_gives_at_the_positions_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    whole = tapped(bundle, threads=1).read(np.array(ROW))[1]
    for layer in ("blocks.0", "blocks.3"):
        part = cut_behind(bundle, layer, tmp_path / layer)
        names = {spec.name.rsplit(".", 1)[0] for spec in part.manifest.signature.state}
        assert names == set(LAYERS[: LAYERS.index(layer) + 1])
        session = open_session(part, device="cpu", threads=1)
        state = session.new_state(1, len(ROW))
        parts = [session.step(np.array([ROW[a:b]]), state, logits="all")[0].copy() for a, b in ((0, 8), (8, 14))]
        np.testing.assert_array_equal(np.concatenate(parts), whole[layer])


def test_engines_of_a_part_are_built_by_the_library(bundle: Bundle, tmp_path: Path) -> None:
    options = EngineOptions(max_batch=1, compute_capabilities=("8.6",))
    part = built_with(options)(cut_behind(bundle, "blocks.1", tmp_path / "part"))
    assert {engine.role for engine in part.manifest.engines} == {"prefill", "decode"}
    assert all(part.file(engine.file).stat().st_size > 0 for engine in part.manifest.engines)


def test_without_a_gpu_there_is_one_sentence_and_nothing_is_built(bundle: Bundle) -> None:
    def built(_: Bundle) -> Bundle:
        raise AssertionError("something was built")

    with pytest.raises((BackendError, BundleError)):  # the latter where there is a GPU that the bundle is not for
        bisect_engines(bundle, [ROW], lambda part: open_session(part, device="tensorrt"), built)


def test_engines_that_answer_sources_are_held_to_their_graphs_whole(tmp_path: Path) -> None:
    options = ExportOptions(
        target="tensorrt", dtype="float16", engine=EngineOptions(build=False, chunk=8), bounds={"top1": 0.0}
    )
    answering = export(t5_model(), tmp_path / "b", options=options).bundle
    rows, sources = rows_to_read(answering, None, 1, 1), sources_to_read(answering, None)
    for wrong, value in ((LOGITS, "logits.narrow"), (None, "no such value")):
        engines = WrongEngines(value, tmp_path / str(wrong))
        engines.scratch.mkdir()
        found = bisect_engines(answering, rows, engines.run, engines.build, sources=sources)
        assert (found.wrong, engines.built, len(found.trials)) == (wrong, 0, 1)
    with pytest.raises(OptionError, match="answers sources, and a text has none; leave --text out"):
        sources_to_read(answering, tmp_path / "text")


def test_what_is_no_number_is_wrong(bundle: Bundle, tmp_path: Path) -> None:
    engines = WrongEngines("layer/blocks.2", tmp_path)
    nothing = dataclasses.replace(
        bisect_engines(bundle, [ROW], engines.run, engines.build).trials[0], difference=np.nan
    )
    assert not nothing.holds
