"""Drafts change no token, greedy or drawn, for every kind of state and however wrong they are, and end in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distribution import check_drawn, softmax
from families import VOCAB
from family_bundles import model_of
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from state_fakes import APPENDED, REPLACED, STATIC, exact_session, ring
from state_fakes import VOCAB as EXACT
from tiny_bundles import attention_bundle, recurrent_bundle, window_bundle

from edgellm_runtime import Model, OptionError, load
from edgellm_runtime.generation.drafting import BundleDrafter, Draft, PromptLookup
from edgellm_runtime.generation.generate import GenerationOptions, Run
from edgellm_runtime.generation.pace import MOST_DRAFTED, Pace
from edgellm_runtime.session import Session

KINDS = ["attention", "local", "lstm", "gru", "short convolutions and attention", "state space", "mixed", "memory"]
CARRIED = [(APPENDED,), (REPLACED,), (ring(24, 8),), (APPENDED, REPLACED, ring(8, 5, "near"), STATIC)]


class Fixed:
    """A drafter that is right, wrong or out of its mind as it was told."""

    def __init__(self, text: Sequence[int], wrong: Sequence[bool], most: int = 5) -> None:
        self._text, self._wrong, self._at, self._most = text, wrong, 0, most

    def drafter(self) -> Fixed:
        return Fixed(self._text, self._wrong, self._most)

    def observe(self, tokens: Sequence[int], /) -> None:
        self._at += len(tokens)

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        tokens = self._text[self._at : self._at + self._most]
        wrong = self._wrong
        return Draft([t if not wrong[(self._at + i) % len(wrong)] else t + 1 for i, t in enumerate(tokens)], "fixed")


def run_of(session: Session, prompt: list[int], **options: Any) -> Run:
    run = Run(session, None, [prompt], GenerationOptions(**options))
    for _ in run.chunks():
        pass
    return run


@pytest.mark.parametrize("specs", CARRIED, ids=lambda specs: "+".join(s.name for s in specs))
@settings(max_examples=25, deadline=None)
@given(
    prompt=st.lists(st.integers(0, EXACT - 2), min_size=1, max_size=20), wrong=st.lists(st.booleans(), min_size=1),
    seed=st.none() | st.integers(0, 9), count=st.integers(1, 60), most=st.integers(1, 20),
)  # fmt: skip
def test_tokens_are_those_without_drafts_bit_by_bit(
    specs: tuple[Any, ...], prompt: list[int], wrong: list[bool], seed: int | None, count: int, most: int
) -> None:
    session = exact_session(*specs, max_context=200)
    options = {"max_new_tokens": count, "logprobs": 2, "no_repeat_ngram": 4, "frequency_penalty": 0.5}
    options |= {} if seed is None else {"temperature": 1.0, "top_p": 0.9, "seed": seed}
    plain = run_of(session, prompt, **options).result()
    source = Fixed([*prompt, *plain.tokens, *[0] * 30], wrong, most)
    for draft in (source, "lookup"):
        run = run_of(session, prompt, draft=draft, **options)
        found = run.result()
        assert found.tokens == plain.tokens and found.logprobs == plain.logprobs
        state = run._state
        assert state is not None and int(state.lengths[0]) <= len(prompt) + count - 1
        held = [*prompt, *plain.tokens][: int(state.lengths[0])]
        fresh = session.step(np.array([[*held, 5]]), session.new_state()).copy()
        assert np.array_equal(session.step(np.array([[5]]), state), fresh), "the state holds what was handed out"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None)
@given(prompt=st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=12), seed=st.none() | st.integers(0, 9))
def test_every_kind_of_model_gives_the_tokens_without_drafts(kind: str, prompt: list[int], seed: int | None) -> None:
    model = model_of(kind)
    options: Any = {"max_new_tokens": 40} | ({} if seed is None else {"temperature": 1.0, "seed": seed})
    plain = model.generate(prompt, **options)
    assert plain.speculation is None
    right = Fixed([*prompt, *plain.tokens, *[0] * 20], [False, False, True])
    for draft in ("lookup", model, model_of("mixed"), model_of("lstm"), right):
        found = model.generate(prompt, draft=draft, **options)
        assert found.tokens == plain.tokens
        assert found.speculation is not None and found.speculation.accepted <= found.speculation.drafted


@pytest.mark.parametrize("make_bundle", [attention_bundle, window_bundle, recurrent_bundle])
def test_bundles_for_the_cpu_give_the_tokens_without_drafts(make_bundle: Callable[[], Path]) -> None:
    model = load(make_bundle(), threads=1)
    plain = model.generate([5, 6, 7, 5, 6], max_new_tokens=80, ignore_eos=True)
    for draft in ("lookup", model, Fixed([5, 6, 7, 5, 6, *plain.tokens], [False, True])):
        assert model.generate([5, 6, 7, 5, 6], max_new_tokens=80, ignore_eos=True, draft=draft).tokens == plain.tokens


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    for kind in ("attention", "mixed"):
        answer = model_of(kind).generate([1, 2, 3], max_new_tokens=50, draft=model_of(kind))
        found = answer.speculation
        assert found is not None and found.accepted == found.drafted > 0 and found.acceptance == 1
        assert found.steps + found.accepted == 49


def test_copied_text_takes_far_fewer_steps() -> None:
    session = exact_session(APPENDED, max_context=400)
    word = [7, 3, 9, 4, 8]
    forced = (word * 20)[:90]
    run = run_of(session, word * 4, max_new_tokens=90, draft="lookup", forced_tokens=forced)
    found = run.result().speculation
    assert list(run.result().tokens) == forced
    assert found is not None and found.steps < 30 and found.acceptance > 0.9


@pytest.mark.parametrize("specs", CARRIED, ids=lambda specs: "+".join(s.name for s in specs))
def test_a_text_that_is_left_within_a_draft_goes_on_as_it_should(specs: tuple[Any, ...], tmp_path: Path) -> None:
    fake = fake_model(tmp_path)
    session = exact_session(*specs, max_context=200)
    model = Model(session, None, fake.bundle)
    whole = model.generate([1, 2, 3], max_new_tokens=40).tokens
    source = Fixed([1, 2, 3, *whole], [False] * 7 + [True])
    for left in range(1, 16):
        with model.stream([1, 2, 3], max_new_tokens=40, state=model.new_state(), draft=source) as stream:
            tokens = tuple(next(stream).token_ids[0] for _ in range(left))
        answer = stream.generation
        assert answer is not None and answer.tokens == tokens == whole[:left] and answer.state is not None
        assert answer.state.read_tokens < len(answer.state) == 3 + left
        assert model.generate([], max_new_tokens=40 - left, state=answer.state).tokens == whole[left:]
        again = answer.state.fork()
        again.rewind(3)
        assert model.generate([], max_new_tokens=9, state=again).tokens == whole[:9]
        ended = model.generate([1, 2, 3], max_new_tokens=40, state=model.new_state(), draft=source,
                               stop_tokens=[whole[left]])  # fmt: skip
        end = whole.index(whole[left])
        assert ended.tokens == whole[: end + 1] and ended.state is not None
        assert model.generate([], max_new_tokens=39 - end, state=ended.state).tokens == whole[end + 1 :]


def test_a_conversation_with_drafts_says_what_one_without_says() -> None:
    model = load(window_bundle(), threads=1)
    plain, drafted = model.conversation(), model.conversation()
    for said in ("aaa", "b"):
        expected = plain.say(said, max_new_tokens=8, ignore_eos=True)
        assert drafted.say(said, max_new_tokens=8, ignore_eos=True, draft="lookup").tokens == expected.tokens
    next(drafted.stream("c", max_new_tokens=16, draft=model))
    next(plain.stream("c", max_new_tokens=16))
    assert drafted.say("d", max_new_tokens=4).tokens == plain.say("d", max_new_tokens=4).tokens


def test_drawn_tokens_have_the_models_distribution() -> None:
    session, prompt, runs = exact_session(APPENDED, REPLACED, max_context=50), [4, 2], 1500
    options: Any = {"max_new_tokens": 3, "temperature": 0.6}
    first = softmax(session.step(np.array([prompt]), session.new_state())[0, 0], 0.6)
    begun = int(first.argmax())
    second = softmax(session.step(np.array([[*prompt, begun]]), session.new_state())[0, 0], 0.6)
    draft = Fixed([*prompt, begun, int(second.argmax()), 1], [False], most=2)
    answers = [run_of(session, prompt, draft=draft, seed=i, **options).result().tokens for i in range(runs)]
    check_drawn(Counter(a[0] for a in answers), first)
    check_drawn(Counter(a[1] for a in answers if a[0] == begun), second)


def test_wrong_drafts_are_made_seldom_and_dear_ones_not_at_all() -> None:
    pace, asked = Pace(), []
    for _ in range(200):
        count = pace.length("guess")
        asked.append(count)
        if count:
            pace.saw("guess", count, 0)
    assert asked[0] > 0 and sum(map(bool, asked[20:])) <= 200 / 20
    for _ in range(30):
        pace.saw("other", 8, 8)
    assert pace.length("other") == MOST_DRAFTED, "each kind is held to its own past"
    pace.took_plain(1.0)
    for _ in range(30):
        pace.took(9, 9.0, 8, 0.0)  # as long as nine steps
    assert pace.length("other") == 0
    for _ in range(60):
        pace.took(9, 1.2, 8, 0.0)
    assert pace.length("other") == MOST_DRAFTED


def test_a_text_looks_up_its_longest_agreement_and_goes_round() -> None:
    lookup = PromptLookup()
    lookup.observe([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 2, 3, 4])
    assert lookup.propose(lambda kind: 3) == Draft([5, 6, 9], "3 tokens")
    lookup.observe([8, 8, 8])
    assert lookup.propose(lambda kind: 4) == Draft([8, 8, 8, 8], "2 tokens")
    assert PromptLookup().propose(lambda kind: 4).tokens == ()


def test_a_drafting_model_reads_each_token_once_where_it_was_right() -> None:
    for specs in ((APPENDED,), (REPLACED,), (ring(8, 5),)):
        session = exact_session(*specs, max_context=200)
        drafter, read = BundleDrafter(session), []
        run = session._backend.run

        def counted(tokens: Any, *rest: Any, run: Any = run, read: list[int] = read) -> Any:
            read.append(tokens.shape[1])
            return run(tokens, *rest)

        session._backend.run = counted  # type: ignore[method-assign]
        drafter.observe([1, 2, 3])
        right = list(drafter.propose(lambda kind: 4).tokens)
        assert read == [3, 1, 1, 1]
        drafter.observe([*right, 7])
        drafter.propose(lambda kind: 1)
        assert read[4:] == [2], "the last drafted token, and the one that was chosen behind it"
        drafter.observe([(right[0] + 1) % EXACT])
        assert drafter.propose(lambda kind: 300).tokens == (), "beyond its own context it has no idea"


def test_other_vocabularies_and_things_that_do_not_draft_are_refused(tmp_path: Path) -> None:
    model = load(attention_bundle(), threads=1)
    with pytest.raises(OptionError, match=r"draft is .+, whose vocabulary is not .+'s; give a model with the same"):
        model.generate("hello", draft=load(recurrent_bundle(), threads=1))
    with pytest.raises(OptionError, match="draft is 'prompt'; it must be 'lookup', 'recurrent', 'combined', a"):
        model.generate("hello", draft="prompt")
    plain = model.generate("hello", max_new_tokens=5).tokens
    assert model.generate("hello", draft=Fixed([10**6] * 50, [False]), max_new_tokens=5).tokens == plain
    batch = model.generate(["hello", "a"], draft="lookup", max_new_tokens=5)
    assert batch[0].tokens == plain and batch[0].speculation is None
