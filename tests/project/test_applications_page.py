"""docs/applications.md is what its records say: no figure of a table was written or changed by hand."""

from __future__ import annotations

import copy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "examples"))  # the examples are programs, not a package

import compare  # noqa: E402
from comparison.page import records, written  # noqa: E402

from edgellm.cli import cli  # noqa: E402

RECORDS = REPOSITORY / "docs/applications"
PAGE = (REPOSITORY / "docs/applications.md").read_text(encoding="utf-8")


def test_every_table_of_the_page_is_what_the_records_give() -> None:
    found = records(RECORDS)
    assert written(PAGE, found) == PAGE
    outside = PAGE
    for name in found:
        before, _, rest = outside.partition(f"<!-- {name} -->")
        outside = before + rest.partition(f"<!-- /{name} -->")[2]
    assert not [text for text in outside.splitlines() if text.startswith("|")]


def test_a_figure_that_changes_in_a_record_changes_the_page() -> None:
    found = copy.deepcopy(records(RECORDS))
    found["both-ways"]["rows"]["srl"]["scores"]["float32"]["span_f1"] = 12.34
    found["srl"]["rows"]["recurrent"]["float32"]["scores"]["span_f1"] = 1.0
    page = written(PAGE, found)
    assert "**span F1 12.34**" in page
    assert "| roles | best of below: hybrid, 2.64 M | 928 |" in page


def test_models_that_read_both_ways_stand_beside_patterns_that_were_measured() -> None:
    found = records(RECORDS)
    del found["srl"]
    with pytest.raises(ValueError, match="no record of srl"):
        written(PAGE, found)


def test_commands_of_the_records_are_commands_that_there_are() -> None:
    for row in records(RECORDS)["both-ways"]["rows"].values():
        for command in row["commands"].values():
            program, name, *words = shlex.split(command)
            shown = CliRunner().invoke(cli, [name, "--help"], env={"COLUMNS": "200"}).output
            assert program == "edgellm"
            assert not [word for word in words if word.startswith("--") and f"{word} " not in shown]


def test_a_page_is_written_where_it_is(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.md", tmp_path / "page.png"
    page.write_text(PAGE.replace("60.70", "99.99"), encoding="utf-8")
    words = ["render", "--results", str(RECORDS), "--page", str(page), "--picture", str(picture)]
    assert CliRunner().invoke(compare.main, words).exit_code == 0
    assert page.read_text(encoding="utf-8") == PAGE
    assert picture.is_file()
