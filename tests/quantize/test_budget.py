"""Automatic quantization: estimates, search, and bundles that keep to a budget or do not appear."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import VOCAB, make

from edgellm.cli.budget import budget_of
from edgellm.cli.export import export as command
from edgellm.streaming import OwnWeights
from edgellm_exporters.auto import automatic
from edgellm_exporters.auto.automatic import Automatic, none_better_than_held, quantize_within
from edgellm_exporters.auto.budget import Budget, divide
from edgellm_exporters.auto.formats import FormatChoices, candidates_of, decode_ns, prefill_ns
from edgellm_exporters.auto.measured_search import Built, MeasuredSearch
from edgellm_exporters.auto.search import Table, front, search
from edgellm_exporters.auto.sensitivity import GPTQ_FACTOR, predicted, sensitivities
from edgellm_exporters.errors import ExportError, QuantizeError
from edgellm_exporters.export import Exported, ExportOptions, export
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.proof.parity import ParityReport, compare
from edgellm_exporters.quantize.plan import ROW, Plan, Scheme
from edgellm_exporters.quantize.planning import Uses
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_exporters.quantize.smooth import Smoothing
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle

FINE, COARSE = Scheme(8, 32), Scheme(4, 32, symmetric=False)
FORMATS = (FINE, Scheme(8, 64), COARSE, Scheme(4, 64, symmetric=False))
TEXT = np.random.default_rng(0).integers(0, VOCAB, 4000).tolist()
CALIBRATION, HELD_OUT = divide(TEXT, 64, 2048)


def auto(model: torch.nn.Module, path: Path, kv_cache: str = "float32", **budget: object) -> Exported:
    options = ExportOptions(
        quantize="auto", budget=Budget(**budget), calibration=CALIBRATION, held_out=HELD_OUT,  # type: ignore[arg-type]
        kv_cache=kv_cache,
    )  # fmt: skip
    return export(model, path, options=options)


def job(family: str, target: str = "cpu") -> Automatic:
    model = make(family)
    return Automatic(
        model=model, weights=OwnWeights(model), target=TARGETS[target], calibration=CALIBRATION, held_out=HELD_OUT
    )


def table(seed: int, weights: int = 5, formats: int = 4) -> Table:
    r = np.random.default_rng(seed)
    size = r.uniform(1, 4, (weights, 1)) * np.linspace(4, 1, formats)
    return Table(
        tuple(map(str, range(weights))), (FORMATS[:formats],) * weights, r.lognormal(0, 1.5, (weights, formats)), size,
        r.uniform(1, 10, (weights, formats)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_search_finds_what_trying_every_assignment_finds(seed: int) -> None:
    numbers, r = table(seed), np.random.default_rng(1000 + seed)
    max_kl = float(np.median(numbers.kl)) * len(numbers.names) * r.uniform(0.3, 1)
    max_bytes = float(numbers.nbytes.mean()) * len(numbers.names) * r.uniform(0.8, 1.3) if seed % 2 else math.inf
    every = (numbers.choice(np.array(p)) for p in itertools.product(range(4), repeat=len(numbers.names)))
    best = min((c.cost for c in every if c.kl <= max_kl and c.nbytes <= max_bytes), default=None)
    found = search(numbers, max_kl, max_bytes)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.kl <= max_kl and found.nbytes <= max_bytes
        assert found.cost == pytest.approx(best)


def test_among_equally_fast_assignments_the_smallest_is_taken() -> None:
    numbers = dataclasses.replace(table(0), cost=np.ones((5, 4)))
    found = search(numbers, math.inf)
    assert found is not None
    assert found.nbytes == numbers.nbytes.min(axis=1).sum()


def test_along_the_front_less_divergence_always_costs_more() -> None:
    line = front(table(3, weights=30))
    kl, cost = [c.kl for c in line], [c.cost for c in line]
    assert kl == sorted(kl) and cost == sorted(cost, reverse=True)
    assert len(line) > 10


@pytest.mark.parametrize("seed", range(5))
def test_a_huge_weight_among_small_ones_hides_no_better_assignment(seed: int) -> None:
    """As a vocabulary does: what is smallest is never half a percent faster than what the search finds fastest."""
    numbers, r = table(seed, weights=40), np.random.default_rng(seed)
    kl = np.cumsum(r.lognormal(-3, 1, (40, 4)), axis=1)  # fewer bytes, more divergence
    scale = np.where(np.arange(40) == 0, 20.0, 1.0)[:, None]
    numbers = dataclasses.replace(numbers, kl=kl * scale, nbytes=numbers.nbytes * scale)
    fast = dataclasses.replace(numbers, cost=numbers.nbytes * r.uniform(0.9, 1.1, (40, 4)))
    for limit in np.linspace(1.05 * kl.min(axis=1).sum(), kl.max(axis=1).sum(), 8):
        smallest = search(dataclasses.replace(numbers, cost=numbers.nbytes), float(limit))
        if smallest is not None:
            fastest = search(fast, smallest.kl)
            picked = [list(s).index(x) for s, x in zip(fast.schemes, smallest.schemes.values(), strict=True)]
            assert fastest is not None
            assert fastest.cost <= fast.cost[np.arange(40), picked].sum() * 1.005


def test_each_weight_is_offered_what_its_use_allows() -> None:
    graph = job("mixed").graph()
    found = {c.name: c for c in candidates_of(Uses(graph), integer_products=True)}
    tied = found["head.weight"]  # the embedding too
    assert tied.role == "head" and not any(s.shifted or s.block == ROW for s in tied.schemes)
    loops = [c for c in found.values() if c.role == "loop"]
    assert len(loops) == 6  # two of each of the three recurrences
    assert all(Scheme(8, ROW) in c.schemes for c in found.values() if c.role == "product")
    for candidate in found.values():
        assert all(s.block == ROW or candidate.shape[1] % s.block == 0 for s in candidate.schemes)
        assert all(decode_ns(candidate, s) > 0 and prefill_ns(candidate, s) > 0 for s in candidate.schemes)


def test_scales_of_8_bits_are_offered_in_the_place_of_16_where_a_target_stores_them() -> None:
    uses = Uses(job("mixed").graph())
    wide, narrow = (candidates_of(uses, integer_products=True, narrow_scales=n) for n in (False, True))
    for one, other in zip(wide, narrow, strict=True):
        assert other.schemes == (one.schemes if one.role == "loop" else tuple(s.narrow for s in one.schemes))
    assert TARGETS["cpu"].narrow_scales and not TARGETS["onnx"].narrow_scales


def test_what_holds_a_checkpoint_s_values_is_looked_for_among_the_formats_that_are_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of loops have scales of 16 bits, and no estimate is better than such a one either."""
    held = dict[str, Scheme]()

    def noted(candidates: Any, predictions: Any, found: dict[str, Scheme]) -> Any:
        held.update(found)
        raise KeyboardInterrupt

    monkeypatch.setattr(automatic, "sensitivities", lambda *_, **__: {})
    monkeypatch.setattr(automatic, "none_better_than_held", noted)
    own = job("mixed")
    with pytest.raises(KeyboardInterrupt):
        quantize_within(Budget(max_kl=0.5), own, tmp_path, 0, lambda what, share: None)
    offered = {c.name: c.schemes for c in candidates_of(Uses(own.graph()), integer_products=False, narrow_scales=True)}
    assert {scheme.scale_bits for scheme in held.values()} == {8, 16}
    assert all(held[name] in schemes for name, schemes in offered.items() if name in held)


def test_a_table_that_is_only_looked_up_in_costs_no_time() -> None:
    graph = job("decoder untied with biases").graph()
    roles = {c.name: c for c in candidates_of(Uses(graph), integer_products=False)}
    assert {name: roles[name].role for name in ("embedding.weight", "head.weight")} == {
        "embedding.weight": "table", "head.weight": "head",
    }  # fmt: skip
    assert decode_ns(roles["embedding.weight"], FINE) == 0
    assert not any(s.block == ROW for c in roles.values() for s in c.schemes)


@pytest.mark.parametrize("family", ["decoder", "mixed"])
def test_estimates_are_near_what_rounding_costs_and_rank_formats(family: str) -> None:
    """Every weight in one format against the same model with rounded weights: PyTorch alone, no kernel's rounding."""
    from edgellm_exporters.quantize.planning import plan_of

    own = job(family)
    graph = own.graph()
    candidates = candidates_of(Uses(graph), integer_products=False)
    found = sensitivities(own.model, own.weights, candidates, Smoothing(), CALIBRATION, rounds_inputs=False)
    tokens = torch.tensor(HELD_OUT[:8])
    with torch.no_grad():
        before = own.model(tokens)[0].double().log_softmax(-1)
        ratios = {}
        for scheme in (FINE, COARSE):
            schemes = {c.name: scheme for c in candidates}
            plan = plan_of(schemes, Smoothing(), own.model, (), lambda what, share: None)
            after = quantized_model(own.model, plan)(tokens)[0].double().log_softmax(-1)
            estimate = predicted(found, schemes) / (GPTQ_FACTOR if scheme is COARSE else 1)
            ratios[scheme] = estimate / float((before.exp() * (before - after)).sum(-1).mean())
    assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    for costs in found.values():
        assert costs[FINE] < costs[COARSE]


def test_of_tuning_less_is_expected_to_be_lost_where_it_can_be_done() -> None:
    own = job("decoder")
    candidates = candidates_of(Uses(own.graph()), integer_products=False, tuned=True)
    plain, tuned = (
        sensitivities(own.model, own.weights, candidates, Smoothing(), CALIBRATION, rounds_inputs=False, tuned=tuned)
        for tuned in (False, True)
    )
    for name, costs in plain.items():
        for scheme, cost in costs.items():
            able = scheme.bits < 8 and not scheme.shifted
            assert tuned[name][scheme] < cost if able else tuned[name][scheme] == cost, (name, scheme)


def test_rounding_inputs_costs_something_too() -> None:
    own = job("decoder")
    graph = own.graph()
    candidates = candidates_of(Uses(graph), integer_products=True)
    plain, rounded = (
        sensitivities(own.model, own.weights, candidates, Smoothing(), CALIBRATION, rounds_inputs=rounds)
        for rounds in (False, True)
    )
    for name, costs in plain.items():
        assert all(rounded[name][scheme] > cost for scheme, cost in costs.items()), name


@pytest.mark.parametrize(
    ("family", "prefer"), [("decoder", "decode"), ("mixed", "size"), ("attention", "prefill"), ("gru", "quality")]
)
def test_a_bundle_within_its_budget_comes_with_the_evidence(family: str, prefer: str, tmp_path: Path) -> None:
    exported = auto(make(family), tmp_path / "b", max_kl=0.01, prefer=prefer)
    manifest = exported.bundle.manifest
    said = manifest.quantization
    assert said["method"] == "auto" and said["budget"]["prefer"] == prefer
    assert 0 < said["held_out"]["kl"] <= 0.01
    assert said["held_out"]["tokens"] == sum(map(len, HELD_OUT))
    assert manifest.bounds["kl"] == pytest.approx(0.03)
    assert {f.name for f in (tmp_path / "b").iterdir()} == {*manifest.files, "manifest.json"}
    Bundle(tmp_path / "b")  # every checksum, the report's among them
    page = (tmp_path / "b" / "quantization.md").read_text()
    assert sum(said["weights"].values()) == page.count("-bit block ") + page.count("-bit row ")
    assert (tmp_path / "b" / "quantization.png").read_bytes().startswith(b"\x89PNG")
    assert exported.verification.ok


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_a_narrow_cache_costs_is_part_of_what_is_measured(dtype: str, tmp_path: Path) -> None:
    model = make("decoder")
    made = auto(model, tmp_path / "b", dtype, max_kl=0.01)
    said, state = made.bundle.manifest.quantization, made.bundle.manifest.signature.state
    assert {spec.dtype for spec in state} == {dtype}
    assert said["cache"] == sorted(spec.name for spec in state)
    assert said["method"] == "auto" and made.verification.ok
    again = compare(model, open_session(made.bundle, threads=1), HELD_OUT)
    assert said["held_out"]["kl"] == pytest.approx(again.kl, rel=1e-3)


def test_a_cache_is_named_among_what_to_leave_out(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"no formats keep to KL 1e-07.*; or leave the cache in int8 out"):
        auto(make("decoder"), tmp_path / "b", "int8", max_kl=1e-7)


def test_a_looser_budget_gives_a_smaller_bundle(tmp_path: Path) -> None:
    model = make("decoder")
    tight, loose = (auto(model, tmp_path / str(kl), max_kl=kl, prefer="size").bundle.nbytes for kl in (0.001, 0.02))
    assert loose < tight


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_kl": 1e-7}, r"no formats keep to KL 1e-07; what can be met, by the estimate: KL \S+ at 0\.\d MB;"),
        (
            {"max_kl": 0.02, "max_size_mb": 0.43},
            r"KL 0.02 and 0.43 MB; .*: 0\.5 MB at KL 0\.0\d+, or at the very least",
        ),
    ],
)
def test_an_impossible_budget_says_what_can_be_met_and_leaves_nothing(
    budget: dict[str, float], said: str, tmp_path: Path
) -> None:
    with pytest.raises(QuantizeError, match=said):
        auto(make("decoder"), tmp_path / "b", **budget)
    assert list(tmp_path.iterdir()) == []


class Scripted:
    """A job whose builds measure what a test says: so many times the prediction."""

    def __init__(self, numbers: Table, *ratios: float) -> None:
        self.numbers, self.ratios = numbers, list(ratios)
        self.kl: list[float] = []
        self.besides = 0  # bytes of a graph that are no weights
        self.nodes = 0  # those of a node more that each weight but one in the first format needs

    def _bytes(self, schemes: Mapping[str, Scheme]) -> int:
        picked = [list(own).index(s) for own, s in zip(self.numbers.schemes, schemes.values(), strict=True)]
        return int(self.numbers.choice(np.array(picked)).nbytes) + self.besides + self.nodes * np.count_nonzero(picked)

    def build(self, schemes: Mapping[str, Scheme], largest: object, directory: Path, progress: object) -> Built:
        picked = [list(own).index(s) for own, s in zip(self.numbers.schemes, schemes.values(), strict=True)]
        choice = self.numbers.choice(np.array(picked))
        self.kl.append(self.ratios[len(self.kl)] * choice.kl)
        (directory / "model").write_text(str(len(self.kl)))
        return Built(self._bytes(schemes), Plan(schemes))

    def weigh(self, schemes: Mapping[str, Scheme], directory: Path) -> int:
        return self._bytes(schemes)

    def measure(self, directory: Path, progress: object) -> ParityReport:
        return ParityReport(1024, 0, self.kl[-1], 0, 1, 0, 1, 2, 2, None)


def hunted(path: Path, max_kl: float, *ratios: float) -> tuple[Scripted, MeasuredSearch]:
    numbers = table(0, weights=60)
    numbers = dataclasses.replace(numbers, nbytes=1e4 * numbers.nbytes)
    scripted = Scripted(numbers, *ratios)
    return scripted, MeasuredSearch(Budget(max_kl=max_kl), scripted, numbers, {}, path, 0, 0)


def test_a_build_that_misses_makes_the_next_more_careful(tmp_path: Path) -> None:
    scripted, hunt = hunted(tmp_path, 60.0, 2.0, 2.0)
    best = hunt.run(lambda what, share: None)
    assert scripted.kl[0] > 60 >= scripted.kl[1]
    assert best is hunt.attempts[1]
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_text() == "2"


def test_a_build_far_within_is_made_cheaper_and_the_cheapest_that_holds_is_kept(tmp_path: Path) -> None:
    scripted, hunt = hunted(tmp_path, 60.0, 0.3, 0.6, 0.4)
    best = hunt.run(lambda what, share: None)
    assert scripted.kl[0] < 30 and scripted.kl[1] > 60 >= scripted.kl[2] > scripted.kl[0]
    assert best is hunt.attempts[2]
    assert (tmp_path / "model").read_text() == "3"


def test_when_every_build_misses_the_message_holds_what_was_measured(tmp_path: Path) -> None:
    _, hunt = hunted(tmp_path, 60.0, 2.0, 4.0, 8.0)
    with pytest.raises(QuantizeError, match=r"corrected by what was measured: .*; measured: KL \S+ at \d+\.\d MB"):
        hunt.run(lambda what, share: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("besides", [0, 100_000])
def test_quality_spends_the_size_in_one_build_whatever_the_graph_takes_besides(besides: int, tmp_path: Path) -> None:
    numbers = dataclasses.replace(table(0, weights=60), cost=table(0, weights=60).kl)
    numbers = dataclasses.replace(numbers, nbytes=1e4 * numbers.nbytes)
    limit = 0.6 * numbers.nbytes.max(axis=1).sum() + 0.4 * numbers.nbytes.min(axis=1).sum()
    budget = Budget(max_kl=1e6, max_size_mb=limit / 1e6, prefer="quality")
    scripted = Scripted(numbers, 1.0, 1.0, 1.0)
    scripted.besides = besides
    best = MeasuredSearch(budget, scripted, numbers, {}, tmp_path, 0, 0).run(lambda what, share: None)
    assert len(scripted.kl) == 1
    spare = limit - 420_000 - besides
    assert best.nbytes <= limit - 420_000 and best.choice.kl == pytest.approx(search(numbers, math.inf, spare).kl)  # type: ignore[union-attr]


def test_the_graph_is_weighed_again_where_other_formats_need_other_nodes(tmp_path: Path) -> None:
    numbers = dataclasses.replace(table(0, weights=60), cost=table(0, weights=60).kl)
    numbers = dataclasses.replace(numbers, nbytes=1e4 * numbers.nbytes)
    limit = 420_000 + 0.3 * numbers.nbytes.max(axis=1).sum() + 0.7 * numbers.nbytes.min(axis=1).sum()
    scripted = Scripted(numbers, 1.0, 1.0, 1.0)
    scripted.nodes = 10_000
    budget = Budget(max_kl=1e6, max_size_mb=limit / 1e6, prefer="quality")
    best = MeasuredSearch(budget, scripted, numbers, {}, tmp_path, 0, 0).run(lambda what, share: None)
    assert len(scripted.kl) == 1
    assert limit - 430_000 < best.nbytes <= limit - 420_000


def test_no_format_is_thought_better_than_a_smaller_one_that_loses_nothing() -> None:
    exact, larger, smaller = Scheme(4, 32, False), Scheme(8, 32), Scheme(4, 64, False)
    weight = FormatChoices("w", (64, 64), (exact, larger, smaller))
    noisy = {"w": {exact: 0.2, larger: 0.1, smaller: 0.15}}
    assert none_better_than_held([weight], noisy, {"w": exact}) == {"w": {exact: 0.2, larger: 0.2, smaller: 0.15}}
    assert none_better_than_held([weight], noisy, {}) == noisy


def test_who_names_a_size_gets_the_best_quality_in_it() -> None:
    text = Path("text.txt")
    assert budget_of("auto", text, None, 87, None) == Budget(max_size_mb=87, prefer="quality")
    assert budget_of("auto", text, None, None, None) == Budget(prefer="decode")
    assert budget_of("auto", text, None, 87, "size") == Budget(max_size_mb=87, prefer="size")


def test_calibration_and_held_out_text_share_no_token() -> None:
    windows, held = divide(list(range(20_000)), 512, 8192)
    assert (len(windows), len(held)) == (16, 4)
    assert windows[-1][-1] < held[0][0] and held[-1][-1] == 19_999


@pytest.mark.parametrize("tokens", [10, 3000])
def test_too_little_text_is_refused_with_the_numbers(tokens: int) -> None:
    with pytest.raises(
        QuantizeError, match=rf"has {tokens} tokens; --quantize auto needs 3072: 2048 .* and 1024 others"
    ):
        divide([1] * tokens, 512, 8192)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-kl", "0.1"], "--max-kl is a limit for automatic formats; add --quantize auto"),
        (["--quantize", "int4", "--prefer", "size"], "leave it out of --quantize int4"),
        (["--quantize", "auto"], "add --calibrate FILE"),
        (["--quantize", "auto", "--calibrate", "t", "--prefer", "speed"], "'speed' is not one of"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["nowhere", "-o", str(tmp_path / "b"), *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_kl": -1.0}, "KL of at most -1.0"),
        ({"max_size_mb": 0.0}, "size of at most 0"),
        ({"prefer": "fun"}, "'fun'"),
    ],
)
def test_an_impossible_limit_is_refused_by_value(budget: dict[str, object], said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        Budget(**budget)  # type: ignore[arg-type]


def test_a_budget_is_for_auto_alone_and_auto_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'auto' and a budget go together"):
        ExportOptions(quantize="int4", budget=Budget())
    with pytest.raises(QuantizeError, match="no text to calibrate with"):
        export(make("decoder"), tmp_path / "b", options=ExportOptions(quantize="auto", budget=Budget()))
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    auto(make("gru alone"), tmp_path / "b", max_kl=0.05)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert set(manifest["quantization"]) == {"method", "rounding", "weights", "budget", "predicted_kl", "held_out"}
    assert manifest["measured"]["exact.kl"] < 0.3 * manifest["measured"]["kl"]  # it is held to its own numbers
