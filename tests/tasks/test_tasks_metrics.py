"""Scores against values counted by hand, and the baselines on data small enough to see through."""

from __future__ import annotations

import sys

import pytest

from edgellm.tasks.metrics import better, bits_per_byte, is_cjk, primary, score, squad_tokens


def questions(*answers: list[str]) -> list[dict[str, object]]:
    return [{"context": "c", "question": "q", "answer": a[0], "answers": a} for a in answers]


def roles(*labels: str) -> list[dict[str, object]]:
    return [{"words": ["w"] * len(one.split()), "predicate": 0, "labels": one.split()} for one in labels]


def test_perfect_translations_score_a_hundred_and_foreign_letters_nothing() -> None:
    examples = [{"source": "x", "target": "The cat sat on the mat."}]
    assert score("translation", ["The cat sat on the mat."], examples) == pytest.approx({"chrf": 100, "bleu": 100})
    assert score("translation", ["щщщ"], examples) == {"chrf": 0.0, "bleu": 0.0}


def test_bleu_of_chinese_counts_characters() -> None:
    examples = [{"source": "x", "target": "我今天在家里看书"}]
    # the first character of eight differs: of the 8, 7, 6 and 5 n-grams one is wrong (13a would see one wrong word)
    found = score("translation", ["你今天在家里看书"], examples)
    assert found["bleu"] == pytest.approx(100 * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25)
    assert is_cjk(["我今天 in", "家里"])
    assert not is_cjk(["mostly English 我"])
    assert not is_cjk(["123"])


def test_closed_questions_are_scored_by_accuracy() -> None:
    found = score("qa", ["yes", " No", "yes", "no"], questions(["yes"], ["no"], ["no"], ["yes"]), choices=("yes", "no"))
    assert found == {"accuracy": 50.0}
    assert primary("qa", found) == "accuracy"


def test_open_questions_take_the_best_of_the_accepted_answers() -> None:
    wanted = questions(["in 1912", "1912"], ["Marie Curie"], ["the old house"])
    found = score("qa", ["1912.", "Curie", "a new house"], wanted)
    # f1: 1; one of one and two words, 2/3; house of (new house) and (old house), 1/2
    assert found == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (1 + 2 / 3 + 1 / 2) / 3})
    assert primary("qa", found) == "f1"
    assert squad_tokens("The cat's, an  hour!") == ["cats", "hour"]


def test_no_answer_is_right_only_where_there_is_none() -> None:
    wanted = questions(["unanswerable"], ["unanswerable"], ["Paris"], ["Rome"])
    found = score("qa", ["unanswerable", "Paris", "unanswerable", "Rome"], wanted, no_answer="unanswerable")
    expected = {"f1": 50.0, "exact_match": 50.0, "f1_answerable": 50.0, "no_answer_accuracy": 50.0}
    assert found == expected


def test_summaries_are_compared_by_stems_and_their_lengths_by_words() -> None:
    examples = [{"text": "x", "summary": "the dogs run home"}]
    found = score("summarization", ["the dog runs away now"], examples)
    # three of five found words and of four wanted ones, by stem; the bigrams "the dog", "dog run" of four and three
    assert found["rouge1"] == pytest.approx(100 * 2 * 3 / (5 + 4))
    assert found["rouge2"] == pytest.approx(100 * 2 * 2 / (4 + 3))
    assert found["rougeL"] == found["rouge1"]
    assert found["length_deviation"] == 1
    assert score("summarization", ["the dog runs away now"], examples, length=10)["length_deviation"] == 5


def test_a_span_counts_only_whole_and_with_its_role() -> None:
    wanted = roles("B-A0 I-A0 B-V B-A1 I-A1", "B-A1 O B-V O O")
    found = score("srl", [["B-A0", "I-A0", "O", "B-A1", "O"], ["B-A0", "O", "B-V", "O", "O"]], wanted)
    # three spans found (the predicate is none), three wanted, one of them right
    assert found["span_precision"] == pytest.approx(100 / 3)
    assert found["span_recall"] == pytest.approx(100 / 3)
    assert found["span_f1"] == pytest.approx(100 / 3)
    assert found["word_accuracy"] == 80.0


def test_a_span_that_does_not_begin_is_none() -> None:
    found = score("srl", [["I-A0", "I-A0", "B-V"]], roles("B-A0 I-A0 B-V"))
    assert found["span_f1"] == 0
    assert found["span_precision"] == 0  # no division by the zero spans that were found


def test_bits_per_byte_do_not_depend_on_the_tokens() -> None:
    assert bits_per_byte(0.6931471805599453, 8, 8) == pytest.approx(1)
    assert bits_per_byte(2 * 0.6931471805599453, 4, 8) == pytest.approx(1)
    assert better("generation", 1.0, 2.0)
    assert better("srl", 2.0, 1.0)


def test_as_many_predictions_as_examples() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        score("qa", ["yes"], questions(["yes"], ["no"]))
    with pytest.raises(ValueError, match="generation has no predictions"):
        score("generation", ["x"], [{"text": "x"}])


def test_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[tasks\]'"):
        score("translation", ["x"], [{"source": "x", "target": "x"}])
