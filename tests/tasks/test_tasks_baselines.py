"""Baselines on data small enough to see through."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.tasks.baselines import Dictionary, predict_baselines
from edgellm.tasks.ngrams import NGrams

PAIRS = [
    ("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch"), ("a house", "ein Haus"),
    ("the small book", "das kleine Buch"),
]  # fmt: skip


def test_dictionary_learns_words_from_sentences() -> None:
    dictionary = Dictionary(PAIRS)
    assert dictionary.translate("The small house") == "das kleine Haus"
    assert dictionary.translate("the zebra") == "das zebra"


def test_dictionary_of_chinese_is_of_characters() -> None:
    dictionary = Dictionary([("cat", "猫"), ("big cat", "大猫"), ("big dog", "大狗"), ("dog", "狗")])
    assert dictionary.translate("big dog cat") == "大狗猫"


def test_translations_without_a_model() -> None:
    train = [{"source": s, "target": t} for s, t in PAIRS]
    found = predict_baselines("translation", train, [{"source": "a book", "target": "?"}])
    assert found == {"copy of the source": ["a book"], "word by word": ["ein Buch"]}


def test_questions_without_a_model() -> None:
    train = [{"context": "", "question": "", "answer": a} for a in ("no", "yes", "yes", "none")]
    example = {"context": "It rained. The tower was built in 1889. All slept.", "question": "When was the tower built?"}
    assert predict_baselines("qa", train, [example], closed=True) == {"most frequent answer": ["yes"]}
    found = predict_baselines("qa", train, [example], no_answer="none")
    assert found == {"most frequent answer": ["yes"], "no answer": ["none"], "likeliest sentence": ["The in 1889."]}


def test_summary_without_a_model_is_the_beginning() -> None:
    train = [{"text": "", "summary": "one two three"}, {"text": "", "summary": "one"}]
    examples = [{"text": "a b c d"}, {"text": "e"}]
    assert predict_baselines("summarization", train, examples) == {"first 2 words": ["a b", "e"]}
    assert predict_baselines("summarization", train, examples, length=3) == {"first 3 words": ["a b c", "e"]}


def test_roles_without_a_model_begin_as_spans_do() -> None:
    train = [
        {"words": ["he", "eats", "red", "fish"], "predicate": 1, "labels": ["B-A0", "B-V", "B-A1", "I-A1"]},
        {"words": ["she", "eats", "red", "fish"], "predicate": 1, "labels": ["B-A0", "B-V", "B-A1", "I-A1"]},
        {"words": ["it", "eats", "now", "fish"], "predicate": 1, "labels": ["B-A0", "B-V", "O", "I-A1"]},
    ]
    example = {"words": ["We", "eat", "Now", "fish"], "predicate": 1}
    found = predict_baselines("srl", train, [example])
    assert found["label by distance"] == [["B-A0", "B-V", "B-A1", "I-A1"]]
    assert found["label by word and distance"] == [["B-A0", "B-V", "O", "B-A1"]]


def test_baselines_need_training_examples_and_a_task_that_has_them() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        predict_baselines("qa", [], [])
    with pytest.raises(ValueError, match="generation has no such baselines"):
        predict_baselines("generation", [{"text": "x"}], [])


@pytest.mark.parametrize("context", [[0, 1], [1, 2], [3, 3], [2, 0]], ids=["seen", "also seen", "unseen", "half seen"])
def test_trigram_probabilities_of_every_next_token_sum_to_one(context: list[int]) -> None:
    model = NGrams(np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 1]), 5)
    nats = np.array([model.trigram_nats(np.array([*context, token]))[1] for token in range(5)])
    assert np.exp(-nats).sum() == pytest.approx(1)
    assert (np.exp(-nats) > 0).all()  # also of token 4, which no text had


def test_trigram_is_kneser_neys() -> None:
    model = NGrams(np.array([0, 1, 0, 1, 0, 2]), 3)
    # triples 010 twice, 101, 102; contexts of the pairs 10, 01 and 02: 1 each; of the tokens 0, 1 and 2: 1 each
    lowest = (1 - 0.75) / 3 + 0.75 * 3 / 3 / 3
    pair = (1 - 0.75) / 2 + 0.75 * 2 / 2 * lowest  # 2 after 0, which 1 follows too
    triple = (1 - 0.75) / 2 + 0.75 * 2 / 2 * pair  # 2 after 1 0
    np.testing.assert_allclose(np.exp(-model.trigram_nats(np.array([1, 0, 2]))), [(1 - 0.75) + 0.75 * lowest, triple])
    np.testing.assert_allclose(np.exp(-model.unigram_nats(np.array([1, 0, 2]))), [4 / 9, 2 / 9])


def test_ngrams_refuse_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="all inside it"):
        NGrams(np.array([0, 1, 5]), 5)
