"""The plugin for llm, through llm's own command line and its Python interface, with a tiny bundle."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_bundles import hidden_bundle, recurrent_bundle

from edgellm_runtime import load

PLUGIN = Path(__file__).parents[2] / "examples/llm_plugin"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """llm's command with this plugin and no other, whatever else is installed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        patch.setenv("LLM_LOAD_PLUGINS", "")
        patch.syspath_prepend(str(PLUGIN))
        plugins = importlib.import_module("llm.plugins")
        plugins.pm.register(importlib.import_module("llm_edgellm"))
        yield importlib.import_module("llm.cli").cli
        plugins.pm.unregister(sys.modules["llm_edgellm"])


def run(cli: Any, *words: str, text: str = "") -> Result:
    return CliRunner().invoke(cli, list(words), input=text, catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def _added(cli: Any) -> None:
    assert run(cli, "edgellm", "add", str(hidden_bundle()), "--name", "tiny").exit_code == 0


def said(text: str, *before: tuple[str, str], **options: Any) -> str:
    messages = [{"role": role, "content": content} for role, content in (*before, ("user", text))]
    return load(hidden_bundle(), threads=1).chat(messages, **options).text


def test_bundles_are_added_listed_and_forgotten(cli: Any) -> None:
    assert "context 96" in run(cli, "edgellm", "add", str(hidden_bundle()), "--name", "second").output
    assert f"edgellm/second\t{hidden_bundle().resolve()}" in run(cli, "edgellm", "list").output
    assert "Edgellm: edgellm/second" in run(cli, "models").output
    assert run(cli, "edgellm", "remove", "edgellm/second").exit_code == 0
    assert "second" not in run(cli, "models").output
    assert "no 'second'; known are tiny" in run(cli, "edgellm", "remove", "second").output


def test_what_is_no_bundle_is_not_added(cli: Any, tmp_path: Path) -> None:
    done = run(cli, "edgellm", "add", str(tmp_path))
    assert done.exit_code == 1
    assert "manifest.json" in done.output
    assert "spaces" in run(cli, "edgellm", "add", str(hidden_bundle()), "--name", "a b").output


@pytest.mark.parametrize("way", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_an_answer_is_what_the_model_says(cli: Any, way: tuple[str, ...]) -> None:
    done = run(cli, "-m", "edgellm/tiny", "hello", "-s", "Be brief.", "-o", "max_tokens", "12", *way)
    assert done.exit_code == 0
    assert done.output.rstrip("\n") == said("hello", ("system", "Be brief."), max_new_tokens=12).rstrip("\n")


def test_options_reach_the_model_and_wrong_ones_are_told(cli: Any) -> None:
    asked = ("-m", "edgellm/tiny", "hello", "-o", "max_tokens", "8", "-o", "temperature", "1.5", "-o", "seed", "7")
    expected = said("hello", max_new_tokens=8, temperature=1.5, seed=7)
    assert run(cli, *asked).output.rstrip("\n") == expected.rstrip("\n")
    assert expected != said("hello", max_new_tokens=8)
    done = run(cli, "-m", "edgellm/tiny", "hello", "-o", "top_p", "2")
    assert done.exit_code == 1
    assert "top_p" in done.output


def test_a_conversation_goes_on_and_reads_only_what_is_new(cli: Any) -> None:
    asked = "hello there, " * 3
    run(cli, "-m", "edgellm/tiny", asked, "-o", "max_tokens", "6")
    first = said(asked, max_new_tokens=6)
    done = run(cli, "-c", "and then", "-o", "max_tokens", "6")
    expected = said("and then", ("user", asked), ("assistant", first), max_new_tokens=6)
    assert done.output.rstrip("\n") == expected.rstrip("\n")
    (row,) = json.loads(run(cli, "logs", "-n", "1", "--json").output)
    assert row["response_json"]["finish_reason"] == "length"
    assert row["output_tokens"] == 6
    assert json.loads(row["token_details"])["cached"] >= 32


def test_a_schema_makes_the_answer_json_of_it(cli: Any) -> None:
    schema = json.dumps({"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"],
                         "additionalProperties": False})  # fmt: skip
    done = run(cli, "-m", "edgellm/tiny", "so?", "--schema", schema, "-o", "max_tokens", "40")
    assert type(json.loads(done.output)["sure"]) is bool


def test_what_the_model_cannot_do_is_one_sentence(cli: Any, tmp_path: Path) -> None:
    done = run(cli, "-m", "edgellm/tiny", "word " * 200)
    assert done.exit_code == 1
    assert "the model's context holds 96" in done.output
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "manifest.json").write_text("{}", encoding="utf-8")
    registry = Path(run(cli, "logs", "path").output.strip()).parent / "edgellm.json"
    registry.write_text(json.dumps(json.loads(registry.read_text()) | {"gone": str(gone)}), encoding="utf-8")
    done = run(cli, "-m", "edgellm/gone", "hello")
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert "Traceback" not in done.output
    run(cli, "edgellm", "remove", "gone")


def test_python_and_asyncio_ask_it_too(cli: Any) -> None:
    import llm

    expected = said("hello", max_new_tokens=5)
    assert llm.get_model("edgellm/tiny").prompt("hello", max_tokens=5).text() == expected

    async def ask(stream: bool) -> str:
        response = llm.get_async_model("edgellm/tiny").prompt("hello", max_tokens=5, stream=stream)
        text: str = await response.text()
        assert (await response.usage()).output == 5
        return text

    assert asyncio.run(ask(True)) == asyncio.run(ask(False)) == expected


def test_embeddings_are_those_of_bundles_that_have_them(cli: Any) -> None:
    run(cli, "edgellm", "add", str(recurrent_bundle()), "--name", "ids")
    done = run(cli, "embed", "-m", "edgellm/tiny", "-c", "hello", "-f", "json")
    assert json.loads(done.output) == pytest.approx(load(hidden_bundle(), threads=1).embed("hello").tolist(), abs=1e-6)
    listed = run(cli, "embed-models").output
    assert "edgellm/tiny" in listed
    assert "edgellm/ids" not in listed
    run(cli, "edgellm", "remove", "ids")


def test_what_is_no_text_is_refused(cli: Any) -> None:
    import llm

    attachment = llm.Attachment(type="image/png", content=b"\x89PNG")
    with pytest.raises(ValueError, match="does not support attachments"):
        llm.get_model("edgellm/tiny").prompt("hello", attachments=[attachment]).text()


def test_a_bundle_without_a_template_has_no_second_turn(cli: Any) -> None:
    run(cli, "edgellm", "add", str(recurrent_bundle()), "--name", "ids")
    import llm

    assert llm.get_model("edgellm/tiny").supports_conversation
    assert not llm.get_model("edgellm/ids").supports_conversation
    run(cli, "edgellm", "remove", "ids")


def test_the_package_names_its_entry_point_and_module() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["llm"] == {"edgellm": "llm_edgellm"}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == ["llm_edgellm.py"]
    assert (PLUGIN / "llm_edgellm.py").exists()


def test_nothing_of_a_prompt_is_kept_but_in_llms_own_log(cli: Any) -> None:
    asked = "hello, and keep this where it belongs"
    assert run(cli, "-m", "edgellm/tiny", asked, "-o", "max_tokens", "3").exit_code == 0
    log = Path(run(cli, "logs", "path").output.strip())
    assert {path.name for path in log.parent.iterdir()} <= {"edgellm.json", "logs.db", "logs.db-wal", "logs.db-shm"}
    assert asked not in (log.parent / "edgellm.json").read_text(encoding="utf-8")
    (row,) = json.loads(run(cli, "logs", "-n", "1", "--json").output)
    assert row["prompt"] == asked
