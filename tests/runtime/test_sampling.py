from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime.errors import BackendError, OptionError
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions

LOGITS = st.lists(
    st.sampled_from([-np.inf, -30.0, -1.5, -1.0, 0.0, 0.25, 1.0, 1.0625, 3.0, 40.0]), min_size=1, max_size=40
)
OPTIONS = st.fixed_dictionaries({
    "temperature": st.sampled_from([1e-300, 1e-12, 0.3, 1.0, 2.5]),
    "top_k": st.integers(0, 45),
    "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
})  # fmt: skip


def reference(logits, seen, o: SamplingOptions) -> np.ndarray:
    """The definition, over the whole vocabulary, one filter after the other."""
    x = [float(np.float32(v)) for v in logits]
    for i in set(seen):
        x[i] = float(np.float32(x[i] / o.repetition_penalty if x[i] > 0 else x[i] * o.repetition_penalty))
    best = max(x)
    x = [(v - best) / o.temperature for v in x]
    p = [math.exp(v) if v > -1e4 else 0.0 for v in x]
    order = sorted(range(len(p)), key=lambda i: (-x[i], i))
    keep = order[: o.top_k] if o.top_k else order
    total, mass, top = sum(p[i] for i in keep), 0.0, []
    for i in keep:
        if top and mass >= o.top_p * total and o.top_p < 1:
            break
        top.append(i)
        mass += p[i]
    top = [i for i in top if p[i] >= o.min_p]
    out = np.zeros(len(p))
    out[top] = [p[i] for i in top]
    return out / out.sum()


def dense(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    ids, p = sampler.distribution(logits)
    out = np.zeros(len(logits))
    out[ids] = p
    return out


@settings(deadline=None, max_examples=300)
@given(LOGITS, OPTIONS, st.lists(st.integers(0, 39), max_size=5))
def test_distribution_is_the_definitions(values, options, seen):
    if not math.isfinite(max(values)):
        values = [*values, 0.0]
    logits = np.array(values, dtype=np.float32)
    seen = [i for i in seen if i < len(logits)]
    o = SamplingOptions(**options)
    sampler = Sampler(o, rows=1, vocab_size=len(logits))
    sampler.observe(0, seen)
    got = dense(sampler, logits)
    np.testing.assert_allclose(got, reference(logits, seen, o), rtol=1e-4, atol=1e-9)
    token = sampler(logits[None])[0]
    assert got[token] > 0


@pytest.mark.parametrize("options", [
    {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
])  # fmt: skip
def test_draws_follow_the_distribution(options):
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32)
    o = SamplingOptions(**{"temperature": 1.0, "seed": 11} | options)
    sampler, n = Sampler(o, rows=1, vocab_size=12), 20000
    expected = n * reference(logits, [], o)
    counts = np.bincount([sampler(logits[None])[0] for _ in range(n)], minlength=12)
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    chi2 = ((counts[live] - expected[live]) ** 2 / expected[live]).sum()
    assert chi2 < 35  # 11 degrees of freedom at most: p < 3e-4, and the seed is fixed


def test_large_vocabulary_takes_the_fast_paths_to_the_same_place():
    logits = np.random.default_rng(0).normal(size=50000).astype(np.float32) * 3
    for options in ({"top_p": 0.9}, {"top_p": 0.9999}, {"top_k": 50}, {"top_k": 50, "top_p": 0.5}, {"min_p": 0.1}):
        o = SamplingOptions(temperature=1.0, **options)
        np.testing.assert_allclose(
            dense(Sampler(o, rows=1, vocab_size=50000), logits), reference(logits, [], o), rtol=1e-4, atol=1e-9
        )


def test_flat_distribution_keeps_the_lowest_ids():
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=3), rows=1, vocab_size=1000)
    assert sampler.distribution(np.zeros(1000, dtype=np.float32))[0].tolist() == [0, 1, 2]
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.5), rows=1, vocab_size=1000)
    assert sampler.distribution(np.zeros(1000, dtype=np.float32))[0].tolist() == list(range(500))


def test_a_row_draws_what_it_draws_alone():
    o = SamplingOptions(temperature=1.0, seed=5, repetition_penalty=1.2)
    steps = np.random.default_rng(1).normal(size=(20, 3, 30)).astype(np.float32)
    together = Sampler(o, rows=3, vocab_size=30)
    batch = np.array([together(s) for s in steps])
    for row in range(3):
        alone = Sampler(o, rows=1, vocab_size=30)
        assert [alone(s[row : row + 1])[0] for s in steps] == batch[:, row].tolist()


def test_rows_that_stay_keep_their_generator():
    o = SamplingOptions(temperature=1.0, seed=5)
    logits = np.random.default_rng(1).normal(size=(1, 500)).astype(np.float32)
    alone = Sampler(o, rows=1, vocab_size=500)
    expected = [alone(logits)[0] for _ in range(4)]
    sampler = Sampler(o, rows=2, vocab_size=500)
    first = [sampler(np.repeat(logits, 2, axis=0))[1] for _ in range(2)]
    assert first + [sampler(logits, [1])[0] for _ in range(2)] == expected


@given(st.integers(0, 2**64), st.floats(-50, 50, width=32))
@settings(deadline=None, max_examples=50)
def test_a_seed_repeats_and_a_common_shift_changes_nothing(seed, shift):
    logits = np.arange(-4, 4, 0.25, dtype=np.float32)[None]
    o = SamplingOptions(temperature=1.0, seed=seed, top_p=0.95)
    one, two = (Sampler(o, rows=1, vocab_size=32) for _ in range(2))
    shifted = logits + np.float32(round(shift))
    assert [one(logits)[0] for _ in range(5)] == [two(shifted)[0] for _ in range(5)]


def test_known_draws_stay_the_same_on_every_platform():
    logits = np.linspace(-2, 2, 100, dtype=np.float32)[None]
    sampler = Sampler(SamplingOptions(temperature=0.8, top_k=60, top_p=0.95, seed=1234), rows=1, vocab_size=100)
    assert [int(sampler(logits)[0]) for _ in range(8)] == KNOWN


KNOWN = [99, 83, 98, 78, 80, 68, 76, 80]


def test_greedy_takes_the_lowest_id_of_equals_and_leaves_the_logits_alone():
    logits = np.array([[0, 3, 3, 1], [5, 0, 0, 5]], dtype=np.float32)
    before = logits.copy()
    for penalty in (1.0, 1.5):
        sampler = Sampler(SamplingOptions(repetition_penalty=penalty), rows=2, vocab_size=4)
        assert sampler(logits).tolist() == [1, 0]
        np.testing.assert_array_equal(logits, before)


def test_penalty_counts_prompt_and_chosen_tokens():
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), rows=1, vocab_size=3)
    sampler.observe(0, [0])
    logits = np.array([[4.0, 3.0, 2.0]], dtype=np.float32)
    assert [int(sampler(logits)[0]) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    logits = np.array([[1.0, bad, 2.0]] if bad != -np.inf else [[bad] * 3], dtype=np.float32)
    with pytest.raises(BackendError, match="best logit"):
        Sampler(SamplingOptions(temperature=temperature), rows=1, vocab_size=3)(logits)


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
    ("repetition_penalty", None), ("seed", -1), ("seed", 1.0),
])  # fmt: skip
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(OptionError, match=rf"{name} is {value!r}; it must be"):
        SamplingOptions(**{name: value})
