"""A conversation is forked, edited, rewound and saved; its answers are those of a fresh reading, and little is read."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fakes import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import text_assets, torch

from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import Conversation, Model, OptionError, StateError, load
from edgellm_runtime.generation import trail

PATTERNS = {"attention": ("attention",), "mixed": ("lstm", "attention", "local"), "gru": ("gru",)}


@functools.cache
def model_of(kind: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = HybridConfig(
        vocab_size=byte_level().get_vocab_size(), width=32, pattern=PATTERNS[kind], num_heads=2, num_kv_heads=1,
        recurrent_width=32, max_context=600, window=12,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(), "bundle")
    export(Hybrid(config).eval(), folder, options=ExportOptions(target="onnx"), text=text_assets())
    return load(folder, threads=1)


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


def fresh(model: Model, talk: Conversation, text: str) -> tuple[int, ...]:
    """What a fresh reading of the messages answers."""
    return model.chat([*talk.messages, {"role": "user", "content": text}], max_new_tokens=4).tokens


def says(model: Model, talk: Conversation, text: str) -> None:
    expected = fresh(model, talk, text)
    assert talk.say(text, max_new_tokens=4).tokens == expected


MOVES = st.lists(st.sampled_from(["say", "rewind", "fork", "edit", "stream"]), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", PATTERNS)
@settings(max_examples=8, deadline=None)
@given(moves=MOVES)
def test_whatever_is_done_to_a_history_answers_are_a_fresh_readings(kind: str, moves: list[str]) -> None:
    model = model_of(kind)
    talk = model.conversation(system="be brief")
    says(model, talk, "hello")
    left = []
    for i, move in enumerate(moves):
        if move == "say":
            says(model, talk, f"and {i}")
        elif move == "rewind":
            talk.rewind(min(1, len(talk.messages) // 2))
        elif move == "fork":
            left.append(talk)
            talk = talk.fork()
        elif move == "edit" and len(talk.messages) > 2:
            talk.edit([{**m, "content": f"{m['content']}!"} if at == 2 else m for at, m in enumerate(talk.messages)])
        elif move == "stream":
            next(talk.stream("what", max_new_tokens=4))
    for each in (talk, *left):
        says(model, each, "the last")


def test_taking_a_turn_back_reads_only_the_new_one(model: Model) -> None:
    talk = model.conversation()
    says(model, talk, "the user said hello to the assistant and the world " * 8)
    says(model, talk, "banana")
    before = talk.messages
    talk.rewind()
    assert talk.messages == before[:2]
    says(model, talk, "orange")
    assert talk.messages[:2] == before[:2]
    assert talk.reused_tokens > 0.7 * (talk.held_tokens - 10)
    with pytest.raises(OptionError, match="turns is 3; it must be an integer from 0 to 2"):
        talk.rewind(3)
    talk.rewind(2)
    assert talk.messages == []


def test_an_edited_history_has_its_own_system_message(model: Model) -> None:
    talk = model.conversation(system="be brief")
    says(model, talk, "hello")
    talk.edit([{"role": "system", "content": "be long"}, *talk.messages[1:]])
    assert talk.system == "be long"
    says(model, talk, "and")
    talk.edit([])
    assert talk.messages == [] and talk.system is None
    parts = [{"type": "text", "text": "a"}]
    for wrong, said in (
        ("no", "messages"), ([{"role": "x", "content": "y"}], "role"), ([{"role": "user", "content": parts}], "a text"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            talk.edit(wrong)  # type: ignore[arg-type]


def test_a_saved_conversation_goes_on_and_reads_nothing_again(model: Model, tmp_path: Path) -> None:
    talk = model.conversation(system="be brief", template_variables={"mood": 1})
    says(model, talk, "hello")
    talk.save(tmp_path / "talk.state")
    again = model.load_conversation(tmp_path / "talk.state")
    assert (again.messages, again.system, again.held_tokens) == (talk.messages, "be brief", talk.held_tokens)
    expected = talk.say("and then", max_new_tokens=6)
    assert again.say("and then", max_new_tokens=6).tokens == expected.tokens
    assert again.reused_tokens == talk.reused_tokens > 0


def test_a_file_that_is_no_conversation_of_this_model_is_refused_by_name(tmp_path: Path) -> None:
    model, file = model_of("mixed"), tmp_path / "talk.state"
    talk = model.conversation()
    says(model, talk, "hello")
    talk.save(file)
    with pytest.raises(StateError, match="another model or another version of it than"):
        model_of("mixed", seed=1).load_conversation(file)
    with pytest.raises(StateError, match="the state of another model"):
        model_of("gru").load_conversation(file)
    with pytest.raises(StateError, match="its text is damaged"):
        model.load_state(file)
    model.read("hello").save(file)
    with pytest.raises(StateError, match="its conversation is damaged"):
        model.load_conversation(file)
    talk.save(file)
    spoiled = [{"held": [1]}, {"held": None}, {"messages": {}}, {"messages": [{"role": "x"}]}, {"inputs": {"x": 1}}]
    for change in spoiled:
        with np.load(file, allow_pickle=False) as arrays:
            whole = {name: arrays[name] for name in arrays.files}
        header: dict[str, Any] = json.loads(str(whole["__header__"]))
        header["about"] |= change
        with (tmp_path / "spoiled").open("wb") as out:
            np.savez(out, **whole | {"__header__": np.array(json.dumps(header))})
        with pytest.raises(StateError, match="its conversation is damaged"):
            model.load_conversation(tmp_path / "spoiled")


def test_what_a_conversation_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trail, "EVERY", 32)
    model = model_of("gru")
    talk = model.conversation()
    for i in range(8):
        talk.say(f"{i} the user said hello to the assistant and the world", max_new_tokens=30, ignore_eos=True)
    assert talk.held_tokens > 400
    per_row = sum(spec.nbytes(1, 1) for spec in model.session.signature.state)
    assert talk.state_bytes <= (trail.MOST + 2) * per_row
