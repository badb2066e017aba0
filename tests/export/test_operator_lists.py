"""What the exporter writes is what the runtime's lists of operators hold, for every family, target and quantization."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from families import CONTEXT, FAMILIES, VOCAB, make, planned

from edgellm_exporters.engines.fixed_sizes import Sizes, write_roles
from edgellm_exporters.errors import LoweringError
from edgellm_exporters.graph import lower
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.capture_encoder import Graphs
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.graph.write import write_graph
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.planning import make_plan
from edgellm_runtime.graphs import operators
from edgellm_runtime.graphs.graph_rules import check_rules
from edgellm_runtime.graphs.onnx_file import read_model

ALL_METHODS = ("mixed", "decoder with q/k norm")  # every kind of layer; of the others, floats and 4 bits


def quiet(what: str, share: float) -> None:
    pass


def test_lists_are_of_the_exporters_targets() -> None:
    assert operators.TARGETS.keys() == TARGETS.keys()
    for name, target in TARGETS.items():
        assert {domain for domain, _ in operators.TARGETS[name]} <= set(target.domains)


@functools.lru_cache(maxsize=1)
def captured(family: str) -> tuple[Any, Any]:
    """A family's model and its graph: tracing takes longer than all that is done with it."""
    model = make(family)
    return model, capture(model)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_target_in_every_precision_is_in_the_lists(
    family: str, target: str, tmp_path: Path
) -> None:
    goal, dtype = TARGETS[target], TARGETS[target].dtypes[0]
    model, traced = captured(family)
    for method in goal.methods if family in ALL_METHODS else ("none", "int4"):
        graph = prepare(traced.clone(), goal)
        plan = make_plan(find_method(method, goal.methods), graph, model, golden_rows(None, VOCAB, CONTEXT).rows, ())
        if goal.roles:
            write_roles(Graphs(graph), goal, plan, Sizes(CONTEXT, 8, 128).forms(dtype), tmp_path, quiet)
        else:
            write_graph(lower_to(graph, goal, plan, dtype=dtype), tmp_path, quiet)
        written = list(tmp_path.glob("*.onnx"))
        assert written
        for file in written:
            check_rules(read_model(file.read_bytes()), target)


def test_operator_outside_the_list_is_refused_at_export_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = planned(make("lstm"), "cpu", "none")
    monkeypatch.setattr(lower, "allowed", lambda target, domain, name: None if name == "LSTM" else {})
    with pytest.raises(LoweringError, match="became the operator LSTM, which bundles for target cpu do not have"):
        lower_to(graph, TARGETS["cpu"], plan)
