"""``edgellm models``: what it lists, and which road it says that a type takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgellm.cli import run
from edgellm.models.registry import ENTRIES


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run(["models", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_architecture_and_every_type_of_transformers_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys)
    assert [row["architecture"] for row in found["native"]] == list(ENTRIES)
    native = {name for row in found["native"] for name in row["huggingface"]}
    assert native == {name for entry in ENTRIES.values() for name in entry.huggingface}
    general = found["general"]["types"]
    assert "gpt2" in general and found["general"]["count"] == len(set(general)) == len(general)
    assert not native & set(general)


def test_the_table_names_architectures_types_and_how_many_take_the_general_road(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    count = told(capsys)["general"]["count"]
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and entry.about in out for name, entry in ENTRIES.items())
    assert f"General road: {count} more types" in out and "gpt_neox" in out


@pytest.mark.parametrize(
    ("kind", "road"),
    [("qwen3", "native"), ("gemma2", "native"), ("hybrid", "native"), ("gpt2", "general"), ("phi", "general")],
)
def test_a_type_is_told_its_road(kind: str, road: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, kind)["road"] == road
    assert run(["models", kind]) == 0
    assert capsys.readouterr().out.startswith(f"{kind}: {road}")


def test_a_native_type_says_which_files_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "llama")["sources"] == ["huggingface", "gguf"]
    assert told(capsys, "mistral")["sources"] == ["huggingface"]
    assert told(capsys, "decoder")["sources"] == ["edgellm"]


def test_an_unknown_type_is_refused_with_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "qwen33"]) == 1
    said = capsys.readouterr().err
    assert "'qwen33' is no type of edgellm's own" in said and "did you mean qwen3" in said


def test_without_transformers_the_native_ones_are_listed_and_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.general.has_transformers", lambda: False)
    found = told(capsys)
    assert found["general"] == {"transformers": None, "count": 0, "types": []} and found["native"]
    assert run(["models"]) == 0
    assert "not installed" in capsys.readouterr().out
    assert told(capsys, "llama")["road"] == "native"
    assert run(["models", "gpt2"]) == 1
    assert "install the extra hf" in capsys.readouterr().err


def test_a_type_that_was_tried_and_refused_is_told_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.general.types.refused", lambda: ("5.1.0", {"gpt2": "it is recurrent", "llama": "no"}))
    found = told(capsys)
    assert found["refused"] == {"transformers": "5.1.0", "types": {"gpt2": "it is recurrent"}}  # llama is native
    assert "gpt2" not in found["general"]["types"]
    assert told(capsys, "gpt2")["why"] == "it is recurrent"
    assert told(capsys, "llama")["road"] == "native"
    assert run(["models", "gpt2"]) == 0
    assert "refused when it was tried with transformers 5.1.0: it is recurrent" in capsys.readouterr().out
    assert run(["models"]) == 0
    assert "Refused, when they were tried with transformers 5.1.0" in capsys.readouterr().out
