"""``make families``: what it tries, that it can fail, and that the pages and the list made from it agree."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellm.cli.models_document import line
from edgellm.models.registry import ENTRIES

REPOSITORY = Path(__file__).parents[2]
PAGE, MODELS = REPOSITORY / "docs" / "families.md", REPOSITORY / "docs" / "models.md"


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """The script's parts lie beside it, where Python looks when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        yield lambda name: importlib.import_module(f"family_checks.{name}")


def test_a_row_that_is_right_works_and_one_that_is_not_is_wrong(parts: Any, tmp_path: Path) -> None:
    check = parts("check")
    road, outcomes = check.try_row("gpt2", tmp_path, ("onnx",))
    assert (road, outcomes["onnx"].word) == ("general", "works")
    theirs = check.build("gpt2")
    with torch.no_grad():
        theirs.transformer.ln_f.bias += 0.5
    wrong = check._compared(theirs, tmp_path / "onnx")
    assert wrong.word == "WRONG"
    assert all(what in wrong.more for what in ("whole", "steps", "chunks", "rows"))


def test_the_page_has_every_row_and_counts_them(parts: Any) -> None:
    table, rows = parts("table"), parts("rows").ROWS
    found = table.read(PAGE)
    assert list(found) == list(rows)
    text = PAGE.read_text(encoding="utf-8")
    for target in parts("check").TARGETS:
        words = Counter(outcomes[target].word for _, outcomes in found.values())
        assert set(words) == {"works", "refused"}  # none wrong, no traceback
        said = re.search(rf"`{target}`: (\d+) work \(\d+%\), (\d+) are refused", text)
        assert said is not None and [int(n) for n in said.groups()] == [words["works"], words["refused"]]


def test_what_the_page_says_is_read_as_it_was_written(parts: Any, tmp_path: Path) -> None:
    table = parts("table")
    found = table.read(PAGE)
    (tmp_path / "page.md").write_text(table.render(found, vocab=1, context=2, window=3), encoding="utf-8")
    assert table.read(tmp_path / "page.md") == found


def test_what_the_command_tells_as_refused_is_what_the_page_tells(parts: Any) -> None:
    told = json.loads((REPOSITORY / "edgellm" / "general" / "refused.json").read_text(encoding="utf-8"))
    assert told["types"] == parts("table").refusals(parts("table").read(PAGE))["types"]


def documented() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", MODELS.read_text(encoding="utf-8").partition("<!-- end of")[0], re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_docs_models_names_every_architecture_and_what_it_reads() -> None:
    """``make docs`` writes the table."""
    expected = {
        name: [entry.about, *(", ".join(f"`{n}`" for n in kind) or "-" for kind in (entry.huggingface, entry.gguf))]
        for name, entry in ENTRIES.items()
    }
    assert {name: cells[:3] for name, cells in documented().items()} == expected
    assert {name: int(cells[3]) for name, cells in documented().items()} == {
        name: len((REPOSITORY / "edgellm" / "models" / f"{name}.py").read_text(encoding="utf-8").splitlines())
        for name in ENTRIES
    }


@pytest.mark.parametrize("name", ["decoder", "mamba"])
def test_docs_models_says_what_layers_run_on(name: str) -> None:
    *_, lines, state, kernels = (cell.strip() for cell in line(name).strip("|\n ").split("|"))
    assert documented()[name][-2:] == [state, kernels]
    assert int(lines) > 100
