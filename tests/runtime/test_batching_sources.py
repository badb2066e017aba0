"""Sources whose answers join and leave a batch that runs: each gets what it gets alone, however long the others are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_models import VOCAB, bart_bundle, own_bundle, t5_bundle, text_bundle

from edgellm_runtime import ContextError, OptionError, load
from edgellm_runtime.batching.batcher import Batcher, context_within, state_bytes
from edgellm_runtime.batching.job import Event, Job
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.batching.rows import ApartRows, CopiedRows, SharedRows
from edgellm_runtime.batching.widths import Widths, width_of
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.model import Model
from edgellm_runtime.session import Session

BUNDLES: dict[str, Callable[[], Path]] = {"t5": t5_bundle, "bart": bart_bundle, "own": own_bundle}


@functools.cache
def model_of(kind: str) -> Model:
    return load(BUNDLES[kind](), threads=1)


def job_of(session: Session, source: list[int], answers: int, told: list[Event], **options: Any) -> Job:
    return Job(
        source, GenerationOptions(**options), answers, told.append, 0.0, session=session, tokenizer=None,
        context=session.max_context,
    )  # fmt: skip


requests = st.lists(
    st.tuples(
        st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=24),
        st.integers(1, 12),  # new tokens
        st.sampled_from([0.0, 1.0]),  # temperature
        st.integers(1, 2),  # answers
        st.integers(0, 9),  # the round that it comes in
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("kind", BUNDLES)
@settings(max_examples=6, deadline=None)
@given(asked=requests, rows=st.integers(2, 4), exact=st.booleans())
def test_each_source_gets_the_answer_that_it_gets_alone(
    kind: str, asked: list[tuple[list[int], int, float, int, int]], rows: int, exact: bool
) -> None:
    model = model_of(kind)
    batcher = Batcher(model.session, BatchOptions(rows=rows, exact=exact))
    events: list[list[Event]] = [[] for _ in asked]
    jobs = [
        (at, job_of(model.session, source, n, told, max_new_tokens=new, temperature=t, seed=i))
        for i, ((source, new, t, n, at), told) in enumerate(zip(asked, events, strict=True))
    ]
    for number in range(400):
        for at, job in jobs:
            if at == number:
                batcher.add(job)
        if number > 9 and not batcher.busy:
            break
        batcher.round()
    assert not batcher.busy
    for i, (source, new, temperature, answers, _) in enumerate(asked):
        found = {e.answer: e.generation for e in events[i] if e.generation is not None}
        assert [e.error for e in events[i] if e.error is not None] == []
        for answer in range(answers):
            alone = model.generate(source, max_new_tokens=new, temperature=temperature, seed=i + answer)
            made = found[answer]
            assert made is not None
            assert (made.tokens, made.finish_reason) == (alone.tokens, alone.finish_reason)
            assert made.prompt_tokens == len(source)
    assert batcher.counts["prompt_tokens"] == sum(len(source) for source, *_ in asked)


@pytest.mark.parametrize("kind", BUNDLES)
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4), leaves=st.integers(0, 3), seed=st.integers(0, 99))
def test_logits_of_rows_are_those_of_the_source_alone(kind: str, lengths: list[int], leaves: int, seed: int) -> None:
    """To rounding; a row that comes to another's place sees nothing of the longer source that was there."""
    session, rng = model_of(kind).session, np.random.default_rng(seed)
    encoder = session.encoder
    assert encoder is not None
    held = SharedRows(session, 4), ApartRows(session), CopiedRows(session)
    alone = []

    def join(length: int) -> None:
        source = rng.integers(4, VOCAB, length).tolist()
        for rows in held:
            state = session.new_state(capacity=1, sources=[source])
            session.step(np.array([encoder.start]), state)
            rows.add(state, 30)
        alone.append(session.new_state(capacity=30, sources=[source]))
        session.step(np.array([encoder.start]), alone[-1])

    for length in lengths:
        join(length)
    for step in range(6):
        if step == 2:
            for rows in held:
                rows.remove(leaves % len(rows))
            alone[leaves % len(alone)] = alone[-1]
            alone.pop()
        if step == 4:
            join(1)
        tokens = rng.integers(0, VOCAB, (len(alone), 1))
        found = []
        for rows in held:
            at, parts = 0, []
            for part in rows.parts():
                parts.append(session.step(tokens[at : at + part.batch], part).copy())
                at += part.batch
            found.append(np.concatenate(parts))
        expected = np.concatenate([session.step(tokens[i : i + 1], own).copy() for i, own in enumerate(alone)])
        assert np.array_equal(found[1], expected)
        for together in (found[0], found[2]):
            np.testing.assert_allclose(together, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_a_row_is_widened_with_what_the_encoder_makes_of_no_tokens() -> None:
    session = model_of("own").session
    row = session.new_state(capacity=3, sources=[[9, 8, 7]])
    wide = Widths(session).widened(row, 12)
    assert (width_of(row), width_of(wide)) == (3, 12)
    assert wide.read("source.mask").tolist() == [[True] * 3 + [False] * 9]
    assert Widths(session).widened(row, 3) is row
    assert [Widths(session).rounded(n) for n in (1, 24, 30)] == [30, 30, 30]  # the model reads no more
    tokens = np.array([[5, 6]])
    np.testing.assert_allclose(session.step(tokens, wide), session.step(tokens, row), rtol=0, atol=1e-5)


def test_a_scheduler_answers_texts_and_says_what_it_cannot() -> None:
    model = load(text_bundle(), threads=1)
    texts = ["Hello there", "a", "The cat sat"]
    with model.scheduler(rows=2) as scheduler:
        tickets = [scheduler.submit(text, max_new_tokens=7) for text in texts]
        found = [ticket.results()[0] for ticket in tickets]
        alone = [model.generate(text, max_new_tokens=7) for text in texts]
        assert [(a.tokens, a.text, a.prompt_tokens) for a in found] == [
            (a.tokens, a.text, a.prompt_tokens) for a in alone
        ]
        with pytest.raises(ContextError, match="25 tokens"):
            scheduler.submit([4] * 25)
        with pytest.raises(OptionError, match="answers a source and does not predict it"):
            scheduler.submit("Hello", prompt_logprobs=1)


def test_long_sources_take_memory_and_wait_for_it() -> None:
    model = model_of("bart")
    session = model.session
    assert state_bytes(session, 1, 40, 40) > state_bytes(session, 1, 40, 1)
    limit = 2 * state_bytes(session, 1, 40, 33) - 1  # a source of 32 tokens takes less
    assert context_within(session, limit, 32) == session.max_context
    assert context_within(session, limit, 33) < 2
    with model.scheduler(state_bytes=limit) as scheduler:
        assert scheduler.submit([9] * 32, max_new_tokens=2).results()[0].tokens
        with pytest.raises(ContextError, match="the source has 33 tokens, but memory for states"):
            scheduler.submit([9] * 33)
    batcher = Batcher(session, BatchOptions(rows=4, state_bytes=4 * state_bytes(session, 1, 40, 32)))
    told: list[Event] = []
    for _ in range(3):
        batcher.add(job_of(session, [9] * 20, 1, told, max_new_tokens=5))
    batcher.round()
    assert (batcher.running, batcher.waiting) == (2, 1)
    while batcher.busy:
        batcher.round()
    assert len([e for e in told if e.generation is not None]) == 3
