"""Requests that join and leave a batch that runs: each gets what it gets alone, for every kind of carried state."""

from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import VOCAB, make
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, device_session

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import ContextError, OptionError, load
from edgellm_runtime.batching.batcher import Batcher, context_within, state_bytes
from edgellm_runtime.batching.job import Event, Job
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.batching.rows import ApartRows, CopiedRows, SharedRows, joined
from edgellm_runtime.batching.widths import Widths
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import BusyError
from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.generation.generate import GenerationOptions
from edgellm_runtime.generation.prefix_cache import PrefixCache, Prefixes
from edgellm_runtime.model import Model
from edgellm_runtime.session import Session

KINDS = ["attention", "local", "lstm", "gru", "memory", "short convolutions and attention", "state space", "mixed"]


@functools.cache
def model_of(kind: str) -> Model:
    folder = Path(tempfile.mkdtemp(), "bundle")
    export(make(kind), folder, options=ExportOptions(target="cpu"))
    return load(folder, threads=1)


class Told:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def answers(self) -> list[Generation]:
        found = {e.answer: e.generation for e in self.events if e.generation is not None}
        return [found[index] for index in sorted(found)]  # type: ignore[misc]

    @property
    def error(self) -> BaseException | None:
        return next((e.error for e in self.events if e.error is not None), None)


def job_of(session: Session, prompt: list[int], *, answers: int = 1, tokenizer: Any = None, **options: Any) -> Job:
    return Job(
        prompt, GenerationOptions(**options), answers, Told(), 0.0, session=session, tokenizer=tokenizer,
        context=session.max_context,
    )  # fmt: skip


def run(batcher: Batcher) -> None:
    rounds = 0
    while batcher.busy:
        batcher.round()
        rounds += 1
        assert rounds < 2000


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        st.integers(1, 12),  # new tokens
        st.sampled_from([0.0, 1.0]),  # temperature
        st.integers(0, 9),  # the round that it comes in
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(asked=requests, rows=st.integers(2, 4), piece=st.sampled_from([None, 3]), exact=st.booleans())
def test_each_request_gets_what_it_gets_alone(
    kind: str, asked: list[tuple[list[int], int, float, int]], rows: int, piece: int | None, exact: bool
) -> None:
    model = model_of(kind)
    batcher = Batcher(model.session, BatchOptions(rows=rows, piece=piece, exact=exact))
    jobs = [
        (at, job_of(model.session, p, max_new_tokens=n, temperature=t, seed=i)) for i, (p, n, t, at) in enumerate(asked)
    ]
    for number in range(10):
        for at, job in jobs:
            if at == number:
                batcher.add(job)
        batcher.round()
    run(batcher)
    for i, (prompt, new, temperature, _) in enumerate(asked):
        alone = model.generate(prompt, max_new_tokens=new, temperature=temperature, seed=i)
        (answer,) = jobs[i][1].sink.answers  # type: ignore[attr-defined]
        assert answer.tokens == alone.tokens
        assert answer.finish_reason == alone.finish_reason


@pytest.mark.parametrize("kind", ["attention", "lstm", "mixed"])
@settings(max_examples=6, deadline=None)
@given(changes=st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=6, max_size=12))
def test_rows_that_are_as_many_as_before_have_the_arrays_bound_before(
    kind: str, changes: list[tuple[bool, int, int]]
) -> None:
    """Whatever joined and left meanwhile, after odd and even numbers of steps, a row has the logits it has alone."""
    session, rows = model_of(kind).session, SharedRows(model_of(kind).session, 3)
    alone: list[Any] = []
    seen: dict[int, Any] = {}
    for number, (joins, at, steps) in enumerate(changes):
        if (joins or not alone) and len(alone) < 3:
            state, own = session.new_state(1, 1), session.new_state(1, 64)
            for each in (state, own):
                session.step(np.array([[number + 1, 2]]), each)
            rows.add(state, 60)
            alone.append(own)
        elif len(alone) > 1:
            rows.remove(at % len(alone))
            alone[at % len(alone)] = alone[-1]
            alone.pop()
        for step in range(steps):
            (part,) = rows.parts()
            assert seen.setdefault(len(alone), part) is part
            tokens = np.array([[(step + row) % VOCAB] for row in range(len(alone))])
            found = session.step(tokens, part).copy()
            expected = np.concatenate([session.step(tokens[i : i + 1], own).copy() for i, own in enumerate(alone)])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4), leaves=st.integers(0, 3), data=st.data())
def test_logits_of_rows_are_those_of_the_row_alone(
    kind: str, lengths: list[int], leaves: int, data: st.DataObject
) -> None:
    """To rounding, which is the kernels'; docs/serving.md has what was measured. Apart they are the very bits."""
    session, rng = model_of(kind).session, np.random.default_rng(data.draw(st.integers(0, 99)))
    prompts = [rng.integers(0, VOCAB, (1, length)) for length in lengths]
    shared, apart, copied = SharedRows(session, 4), ApartRows(session), CopiedRows(session)
    alone = [session.new_state(1, 40) for _ in prompts]
    for prompt, own in zip(prompts, alone, strict=True):
        session.step(prompt, own)
        for rows in (shared, apart, copied):
            state = session.new_state(1, 1)
            session.step(prompt, state)
            rows.add(state, 40)
    for step in range(6):
        if step == 3 and len(shared) > 1:
            for rows in (shared, apart, copied):
                rows.remove(leaves % len(rows))
            alone[leaves % len(alone)] = alone[-1]
            alone.pop()
        tokens = rng.integers(0, VOCAB, (len(shared), 1))
        found = [
            np.concatenate([session.step(tokens[at : at + part.batch], part).copy() for at, part in each])
            for each in (enumerate(shared.parts()), enumerate(apart.parts()), enumerate(copied.parts()))
        ]
        expected = np.concatenate([session.step(tokens[at : at + 1], own).copy() for at, own in enumerate(alone)])
        assert np.array_equal(found[1], expected)
        for together in (found[0], found[2]):
            np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("kind", ["attention", "local", "lstm", "mixed"])
@pytest.mark.parametrize("together", [True, False])
def test_what_prompts_have_in_common_is_read_once(kind: str, together: bool) -> None:
    model, cache = model_of(kind), PrefixCache(1 << 24)
    batcher = Batcher(
        model.session, BatchOptions(rows=3), prefixes=Prefixes(cache, model.session, model.bundle.fingerprint)
    )
    common = [(7 * i) % VOCAB for i in range(33)]
    prompts = [[*common, i, i + 1] for i in range(3)] + [[*common[:20], 5]]
    jobs = []
    for prompt in prompts:
        jobs.append(job_of(model.session, prompt, max_new_tokens=6))
        batcher.add(jobs[-1])
        if not together:
            run(batcher)
    run(batcher)
    answers = [job.sink.answers[0] for job in jobs]  # type: ignore[attr-defined]
    assert [a.tokens for a in answers] == [model.generate(p, max_new_tokens=6).tokens for p in prompts]
    found = [a.cached_tokens for a in answers]
    assert together or found == [0, 32, 32, 0]
    assert found[0] == found[3] == 0
    assert batcher.counts["prompt_tokens"] == sum(map(len, prompts)) - sum(found)


@pytest.mark.parametrize("kind", ["attention", "local", "lstm", "mixed"])
@pytest.mark.parametrize("answers", [1, 2])
def test_the_next_turn_of_a_chat_reads_only_what_is_new(kind: str, answers: int) -> None:
    model = model_of(kind)
    cache = PrefixCache(1 << 24)
    prefixes = Prefixes(cache, model.session, model.bundle.fingerprint)
    batcher = Batcher(model.session, BatchOptions(), prefixes=prefixes)
    first = [job_of(model.session, [i, *range(20)], max_new_tokens=30 + i) for i in range(answers)]
    for job in first:
        batcher.add(job)
    run(batcher)
    for i, job in enumerate(first):
        said = job.sink.answers[0].tokens  # type: ignore[attr-defined]
        prompt = [i, *range(20), *said, 3, 4]
        second = job_of(model.session, prompt, max_new_tokens=4)
        before = batcher.counts["prompt_tokens"]
        batcher.add(second)
        run(batcher)
        (answer,) = second.sink.answers  # type: ignore[attr-defined]
        held = 21 + len(said) - 1  # of an answer the last token is not read
        assert answer.cached_tokens == held // 32 * 32 > 21
        assert batcher.counts["prompt_tokens"] - before == len(prompt) - answer.cached_tokens
        assert answer.tokens == model.generate(prompt, max_new_tokens=4).tokens


@pytest.mark.parametrize("kind", ["attention", "local", "lstm", "memory"])
def test_joined_states_are_their_rows(kind: str) -> None:
    session = model_of(kind).session
    states = [session.new_state(rows, 4) for rows in (1, 2)]
    session.step(np.array([[1, 2, 3]]), states[0])
    session.step(np.array([[4, 5], [6, 7]]), states[1])
    whole = joined(states, Widths(session))
    assert whole.lengths.tolist() == [3, 2, 2]
    again = np.concatenate([session.step(np.array([[8]] * s.batch), s).copy() for s in states])
    np.testing.assert_allclose(session.step(np.array([[8]] * 3), whole), again, rtol=0, atol=1e-5)


def test_a_session_that_chooses_for_itself_is_let() -> None:
    session = device_session(Bundle(attention_bundle()))
    assert session.candidates
    asked = [([5, 6, 7], {}), ([8], {"temperature": 0.7, "top_k": 3, "seed": 4}), ([9, 3], {})]
    model = load(attention_bundle(), threads=1)
    batcher = Batcher(session, BatchOptions(rows=3))
    jobs = [job_of(session, p, max_new_tokens=8, ignore_eos=True, **o) for p, o in asked]
    for job in jobs:
        batcher.add(job)
    run(batcher)
    for (prompt, options), job in zip(asked, jobs, strict=True):
        expected = model.generate(prompt, max_new_tokens=8, ignore_eos=True, **options).tokens
        assert job.sink.answers[0].tokens == expected  # type: ignore[attr-defined]


def test_answers_run_while_a_long_prompt_is_read(tmp_path: Path) -> None:
    model = fake_model(tmp_path, max_context=64)
    batcher = Batcher(model.session, BatchOptions(rows=3, piece=4))
    short = job_of(model.session, [5, 6], max_new_tokens=30)
    long, other = (
        job_of(model.session, list(range(5, 45)), max_new_tokens=4),
        job_of(model.session, [7], max_new_tokens=4),
    )
    batcher.add(short)
    batcher.round()
    batcher.add(long)
    batcher.add(other)
    before = len(short.sink.events)  # type: ignore[attr-defined]
    for number in range(1, 11):
        batcher.round()
        assert len(short.sink.events) == before + number  # type: ignore[attr-defined]
    assert other.sink.answers  # type: ignore[attr-defined]  # a short prompt does not wait for the long one
    assert not long.sink.events  # type: ignore[attr-defined]
    run(batcher)
    assert long.sink.answers[0].tokens == model.generate(long.prompt, max_new_tokens=4).tokens  # type: ignore[attr-defined]


def test_those_who_wait_come_in_order_and_none_is_overtaken(tmp_path: Path) -> None:
    session = fake_model(tmp_path).session
    batcher = Batcher(session, BatchOptions(rows=4))
    running = job_of(session, [5], max_new_tokens=12)
    wide = job_of(session, [6], answers=4, max_new_tokens=3, temperature=1.0, seed=1)
    narrow = job_of(session, [7], max_new_tokens=3)
    for job in (running, wide, narrow):
        batcher.add(job)
    while not narrow.sink.events:  # type: ignore[attr-defined]
        assert batcher.busy
        batcher.round()
    assert wide.sink.answers  # type: ignore[attr-defined]
    run(batcher)


def test_several_answers_have_a_seed_each(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    with model.scheduler() as scheduler:
        together = scheduler.submit("hello", answers=3, seed=5, temperature=1.0, max_new_tokens=6).results()
    alone = [model.generate("hello", seed=5 + i, temperature=1.0, max_new_tokens=6) for i in range(3)]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]


def test_each_request_has_its_own_options(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("hello", {"max_new_tokens": 9}),
        ("the world", {"max_new_tokens": 9, "logprobs": 2}),
        ("said", {"max_new_tokens": 9, "temperature": 0.9, "seed": 3, "banned_tokens": [50, 60]}),
        ("user", {"max_new_tokens": 9, "stop": "e", "echo": True, "frequency_penalty": 0.4}),
        ("a", {"max_new_tokens": 0}),
    ]
    with model.scheduler(rows=3) as scheduler:
        tickets = [scheduler.submit(prompt, **options) for prompt, options in asked]
        found = [ticket.results()[0] for ticket in tickets]
    for (prompt, options), answer in zip(asked, found, strict=True):
        alone = model.generate(prompt, **options)
        assert (answer.tokens, answer.text, answer.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
        assert answer.logprobs == alone.logprobs
        assert answer.prompt_tokens == alone.prompt_tokens


def test_an_error_of_ones_own_is_ones_own(tmp_path: Path) -> None:
    model = fake_model(tmp_path)

    def spoil(tokens: Any, logits: Any) -> None:
        if len(tokens) > 7:
            raise LookupError("mine")

    with model.scheduler(rows=2) as scheduler:
        bad = scheduler.submit("hello", logits_processors=[spoil], max_new_tokens=20, ignore_eos=True)
        good = scheduler.submit("the world", max_new_tokens=20, ignore_eos=True)
        with pytest.raises(LookupError, match="mine"):
            bad.results()
        assert good.results()[0].tokens == model.generate("the world", max_new_tokens=20, ignore_eos=True).tokens
        assert scheduler.load.counts["failed"] == 1


def test_a_step_that_fails_ends_its_rows_and_the_next_request_is_answered(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    session = model.session
    batcher = Batcher(session, BatchOptions(rows=2))
    jobs = [job_of(session, [5, 6], max_new_tokens=9, ignore_eos=True), job_of(session, [7], max_new_tokens=9)]
    for job in jobs:
        batcher.add(job)
    batcher.round()
    batcher.round()
    step, session.step = session.step, _fails
    batcher.round()
    session.step = step
    assert all(isinstance(job.sink.error, MemoryError) for job in jobs)  # type: ignore[attr-defined]
    assert not batcher.busy
    again = job_of(session, [5, 6], max_new_tokens=9)
    batcher.add(again)
    run(batcher)
    assert again.sink.answers[0].tokens == model.generate([5, 6], max_new_tokens=9).tokens  # type: ignore[attr-defined]


def _fails(*_: Any, **__: Any) -> Any:
    raise MemoryError("none left")


def test_a_cancelled_request_leaves_and_keeps_what_it_has(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    session = model.session
    batcher = Batcher(session, BatchOptions(rows=2, piece=2))
    jobs = [job_of(session, [5 + i] * 9, max_new_tokens=9, ignore_eos=True) for i in range(3)]
    for job in jobs:
        batcher.add(job)
    while not jobs[0].sink.events:  # type: ignore[attr-defined]
        batcher.round()
    for job in jobs:  # one is answered, one is read, one waits
        job.cancelled.set()
    batcher.round()
    assert not batcher.busy
    assert [job.sink.answers[0].finish_reason for job in jobs] == ["cancelled"] * 3  # type: ignore[attr-defined]
    assert [len(job.sink.answers[0].tokens) for job in jobs] == [1, 0, 0]  # type: ignore[attr-defined]
    assert batcher.nbytes == 0


def test_a_deadline_ends_a_request(tmp_path: Path) -> None:
    session, now = fake_model(tmp_path).session, [0.0]
    batcher = Batcher(session, BatchOptions(), clock=lambda: now[0])
    job = job_of(session, [5], max_new_tokens=40, ignore_eos=True, deadline=3.0)
    batcher.add(job)
    while batcher.busy:
        batcher.round()
        now[0] += 0.5
    (answer,) = job.sink.answers  # type: ignore[attr-defined]
    assert answer.finish_reason == "deadline"
    assert 0 < len(answer.tokens) < 40


def test_a_reader_that_fails_ends_its_own_request(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    with model.scheduler(rows=2) as scheduler:

        def gone(event: Event) -> None:
            raise ConnectionError

        scheduler.submit("hello", sink=gone, max_new_tokens=30, ignore_eos=True)
        other = scheduler.submit("the world", max_new_tokens=30, ignore_eos=True)
        assert other.results()[0].tokens == model.generate("the world", max_new_tokens=30, ignore_eos=True).tokens
    assert scheduler.load.counts["ended_cancelled"] == 1


def test_a_full_queue_refuses_or_lets_wait(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    held, entered = threading.Event(), threading.Event()

    def hold(tokens: Any, logits: Any) -> None:
        entered.set()
        assert held.wait(30)

    with model.scheduler(rows=1, queue=1) as scheduler:
        first = scheduler.submit("hello", logits_processors=[hold], max_new_tokens=1)
        assert entered.wait(30)
        second = scheduler.submit("hello", max_new_tokens=2)
        with pytest.raises(BusyError, match="1 requests wait already"):
            scheduler.submit("hello")
        assert scheduler.load.counts["refused"] == 1
        third: list[Any] = []
        waiter = threading.Thread(target=lambda: third.append(scheduler.submit("the", wait=True, max_new_tokens=2)))
        waiter.start()
        held.set()
        waiter.join(30)
        assert len(first.results()[0].tokens) == 1
        assert len(second.results()[0].tokens) == len(third[0].results()[0].tokens) == 2
    with pytest.raises(BusyError, match="closed"):
        scheduler.submit("hello")


def test_closing_answers_what_was_taken_or_cancels_it(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    scheduler = model.scheduler(rows=1)
    tickets = [scheduler.submit("hello", max_new_tokens=20, ignore_eos=True) for _ in range(3)]
    scheduler.close()
    assert [len(t.results()[0].tokens) for t in tickets] == [20] * 3
    scheduler = model.scheduler(rows=1)
    tickets = [scheduler.submit("hello", max_new_tokens=20, ignore_eos=True) for _ in range(3)]
    scheduler.close(drain=False)
    assert tickets[-1].results()[0].finish_reason == "cancelled"


def test_memory_for_states_holds_requests_back_and_shortens_the_context() -> None:
    model = model_of("attention")
    session = model.session
    limit = 3 * state_bytes(session, 1, 64)
    assert context_within(session, limit) == session.max_context
    assert context_within(session, limit // 100) == 0
    with pytest.raises(OptionError, match="give it more"):
        model.scheduler(state_bytes=limit // 100)
    batcher = Batcher(session, BatchOptions(rows=8, state_bytes=limit))
    jobs = [job_of(session, [i + 1], max_new_tokens=5) for i in range(4)]
    for job in jobs:
        batcher.add(job)
    most = 0
    while batcher.busy:
        batcher.round()
        most = max(most, batcher.running)
    assert most < 4
    assert all(job.sink.answers for job in jobs)  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    with model.scheduler(rows=2) as scheduler:
        with pytest.raises(ContextError, match="context holds 64"):
            scheduler.submit([5] * 65)
        with pytest.raises(OptionError, match="answers is 3"):
            scheduler.submit("hello", answers=3)
        with pytest.raises(OptionError, match="seed has 3 numbers for 2 answers"):
            scheduler.submit("hello", answers=2, seed=[1, 2, 3])
        with pytest.raises(OptionError, match="stop_tokens"):
            scheduler.submit("hello", stop_tokens=[9999])
    with pytest.raises(OptionError, match="rows is 0"):
        model.scheduler(rows=0)
