"""A bundle's own drafter: proved by goldens, and of no effect on any token, however wrong it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from distribution import check_drawn, softmax
from drafter_bundles import draft_always, drafter_bundle, head_for, untrained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bundles import HIDDEN_KINDS, copied, edit_manifest, hidden_bundle, sign

from edgellm.cli import cli
from edgellm_exporters.errors import ExportError
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import BundleError, OptionError, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.generation.drafting import CombinedDrafter, RecurrentDrafter
from edgellm_runtime.generation.pace import Pace
from edgellm_runtime.loading import open_session

IN_TEST = [HealthCheck.function_scoped_fixture]


@pytest.mark.parametrize("kind", HIDDEN_KINDS)
@settings(max_examples=6, deadline=None, suppress_health_check=IN_TEST)
@given(
    prompt=st.lists(st.integers(0, 60), min_size=1, max_size=12), seed=st.none() | st.integers(0, 9),
    length=st.integers(1, 7), draft=st.sampled_from(["recurrent", "combined"]),
)  # fmt: skip
def test_tokens_are_those_without_drafts(
    kind: str, prompt: list[int], seed: int | None, length: int, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_always(monkeypatch, length)
    model = load(drafter_bundle(kind), threads=1)
    options: Any = {"max_new_tokens": 40, "ignore_eos": True} | (
        {} if seed is None else {"temperature": 1.0, "seed": seed}
    )
    plain = model.generate(prompt, **options)
    found = model.generate(prompt, draft=draft, **options)
    assert found.tokens == plain.tokens
    assert found.speculation is not None and found.speculation.drafted > 0
    assert found.speculation.steps + found.speculation.accepted == 39


def test_command_drafts_and_says_how_many_were_right(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    arguments = ["generate", str(drafter_bundle()), "hello", "--raw", "--max-new-tokens", "9", "--ignore-eos", "--json"]
    plain, found = (
        json.loads(CliRunner().invoke(cli, [*arguments, *more], catch_exceptions=False).output)
        for more in ([], ["--draft", "recurrent"])
    )
    assert found["tokens"] == plain["tokens"] and found["speculation"]["drafted"] > 0


def test_drawn_tokens_have_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch, 2)
    model, prompt, heat = load(drafter_bundle(), threads=1), [5, 6], 0.25
    session = model.session
    first = softmax(session.step(np.array([prompt]), session.new_state())[0, 0], heat)
    begun = int(first.argmax())
    second = softmax(session.step(np.array([[*prompt, begun]]), session.new_state())[0, 0], heat)
    options: Any = {"max_new_tokens": 3, "temperature": heat, "ignore_eos": True, "draft": "recurrent"}
    answers = [model.generate(prompt, seed=i, **options).tokens for i in range(500)]
    check_drawn(Counter(a[0] for a in answers), first)
    check_drawn(Counter(a[1] for a in answers if a[0] == begun), second)


def test_a_text_that_is_left_within_a_draft_goes_on_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    model = load(drafter_bundle("recurrent"), threads=1)
    whole = model.generate([1, 2, 3], max_new_tokens=30).tokens
    for left in range(1, 12):
        with model.stream([1, 2, 3], max_new_tokens=30, state=model.new_state(), draft="recurrent") as stream:
            tokens = tuple(next(stream).token_ids[0] for _ in range(left))
        answer = stream.generation
        assert answer is not None and answer.tokens == tokens == whole[:left] and answer.state is not None
        going_on = model.generate([], max_new_tokens=30 - left, state=answer.state, draft="recurrent")
        assert going_on.tokens == whole[left:]


def test_a_drafter_that_finds_nothing_is_asked_less_and_less() -> None:
    session = load(drafter_bundle(), threads=1).session
    assert session.drafter is not None
    drafter, asked = RecurrentDrafter(session.drafter, lambda chance: False), list[str]()

    def wanted(kind: str) -> int:
        asked.append(kind)
        return 4

    for _ in range(200):
        drafter.observe([3])
        drafter.saw(np.zeros((1, session.hidden_width), np.float32))
        assert not drafter.propose(wanted).tokens
    assert 4 < len(asked) < 20
    drafter = RecurrentDrafter(session.drafter, lambda chance: True)
    drafter.observe([3])
    assert drafter.propose(lambda kind: 4).tokens == (), "before there is a hidden state"
    drafter.saw(np.zeros((1, session.hidden_width), np.float32))
    assert len(drafter.propose(lambda kind: 1).tokens) == drafter.MOST, "its chances say how many, not the pace"
    assert not drafter.propose(lambda kind: 0).tokens


def test_what_is_read_at_once_is_what_is_read_one_after_another() -> None:
    graph = load(drafter_bundle(), threads=1).session.drafter
    assert graph is not None
    rng = np.random.default_rng(0)
    hidden, tokens = rng.standard_normal((19, graph.features)).astype(np.float32), rng.integers(0, 60, 19).tolist()
    hidden[11:], tokens[11:] = hidden[:8], tokens[:8]  # what a memory finds again
    for count in (2, 8, 9, 19):
        ours, again = graph.steps(), graph.steps()
        found = ours.read(tokens[:count], hidden[:count])
        for at in range(count):
            expected = again.read(tokens[at : at + 1], hidden[at : at + 1])
        assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], abs=1e-5)
        drafts = [steps.draft([7], hidden[:1], 4, lambda chance: True) for steps in (ours, again, ours)]
        assert drafts[0] == drafts[1]
        again.guess(5)  # nothing is kept of what is drafted
        assert again.draft([7], hidden[:1], 4, lambda chance: True) == drafts[2]


def test_tokens_that_were_not_read_begin_a_text_anew() -> None:
    graph = load(drafter_bundle(), threads=1).session.drafter
    assert graph is not None
    hidden = np.random.default_rng(0).standard_normal((40, graph.features)).astype(np.float32)

    def drafted(*told: int) -> list[int]:
        drafter, at = RecurrentDrafter(graph, lambda chance: True), 0
        for count in told:
            drafter.observe([x % 60 for x in range(at, at + abs(count))])
            if count > 0:
                drafter.saw(hidden[at : at + count])
            at += abs(count)
        return list(drafter.propose(lambda kind: 4).tokens)

    assert drafted(3) == drafted(1, 2), "read late, they are what they would have been"
    assert drafted(-3) == [], "before there is a hidden state"
    assert len(drafted(-3, 2)) == RecurrentDrafter.MOST
    assert len(drafted(20, 20)) == RecurrentDrafter.MOST, "too many to be read late"


def test_repeated_words_are_looked_up_and_others_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    graph = load(drafter_bundle(), threads=1).session.drafter
    assert graph is not None
    drafter, hidden = CombinedDrafter(graph), np.zeros((1, graph.features), np.float32)
    drafter.observe([1, 2, 3, 4, 5, 1, 2, 3])
    drafter.saw(hidden)
    assert drafter.propose(lambda kind: 3) == ([4, 5, 1], "3 tokens")
    drafter.observe([9])
    drafter.saw(hidden)
    assert drafter.propose(lambda kind: 3).kind == "recurrent"
    assert drafter.propose(lambda kind: 3 * (kind != "recurrent")).tokens == ()


def test_a_further_token_is_worth_what_it_costs() -> None:
    pace = Pace()
    assert pace.worth(0.9) and not pace.worth(0.01)
    pace.took_plain(1.0)
    for _ in range(40):
        pace.took(3, 3.0, 2, 0.0)  # a drafted token takes a plain step
    assert not pace.worth(0.9)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_goldens_prove_it(quantize: str, tmp_path: Path) -> None:
    path = copied(drafter_bundle("attention", quantize), tmp_path)

    def held() -> dict[str, bool]:
        bundle = Bundle(path)
        return {c.name: c.ok for c in verify(bundle, open_session(bundle, threads=1)).checks}

    assert held()["drafter"]
    goldens = json.loads((path / "goldens.json").read_text())
    goldens["drafter"][1]["chance"][2] += 0.6
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    assert [name for name, ok in held().items() if not ok] == ["drafter"]
    goldens["drafter"][1]["chance"][2] -= 0.6
    goldens["drafter"][1]["past"] = [x + 20 for x in goldens["drafter"][1]["past"]]
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    assert [name for name, ok in held().items() if not ok] == ["drafter"], "it begins with what was read before"
    del goldens["drafter"]
    (path / "goldens.json").write_text(json.dumps(goldens))
    sign(path, "goldens.json")
    with pytest.raises(BundleError, match="no drafts to verify by"):
        held()


@pytest.mark.parametrize(
    "change", [{"file": "model.onnx"}, {"file": "other.onnx"}, {"width": 0}, {"width": 31}, {"bound": 2.0}, None]
)
def test_a_manifest_with_another_drafter_is_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    path = copied(drafter_bundle(), tmp_path)
    data = Bundle(path).manifest.to_json()
    if change is None:  # hidden states, which it reads, are gone
        edit_manifest(path, signature=data["signature"] | {"outputs": data["signature"]["outputs"][:1]})
    else:
        edit_manifest(path, drafter=data["drafter"] | change)
    with pytest.raises(BundleError):
        Bundle(path)


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the bundle has no drafter; export the model with --drafter"):
        load(hidden_bundle(), threads=1).generate("hello", draft="recurrent")
    model, head = HIDDEN_KINDS["attention"][0](), head_for("attention")
    for options, said in (
        (ExportOptions(drafter=head), "export with --hidden too"),
        (ExportOptions(drafter=untrained(61), hidden=True), "trained for 61 tokens"),
        (ExportOptions(drafter=untrained(model.config.vocab_size, features=48), hidden=True), "reads 48 features"),
        (ExportOptions(drafter=head, hidden=True, target="cuda", dtype="float16"), "no form of drafters yet"),
    ):
        with pytest.raises(ExportError, match=said):
            export(model, tmp_path / "bundle", options=options)
    assert not (tmp_path / "bundle").exists()
