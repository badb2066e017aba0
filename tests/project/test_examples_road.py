"""The examples' road from data to answers, and the comparison that is made of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # the examples are programs, not a package

import compare  # noqa: E402
from comparison import work  # noqa: E402
from comparison.sizes import PATTERNS, TOLERANCE, equal_sizes, parameters  # noqa: E402
from comparison.tables import draw, render, table  # noqa: E402
from road import walk  # noqa: E402

from edgellm.errors import ConfigError  # noqa: E402


class Fakes:
    """Stands for the commands: remembers them and answers with figures."""

    def __init__(self, total: int = 0) -> None:
        self.calls: list[list[str]] = []

    def edgellm(self, what: str, *words: object) -> dict[str, Any]:
        arguments = [str(word) for word in words]
        self.calls.append(arguments)
        if arguments[0] == "train":
            return {"parameters": 1_000_000, "checkpoint": "best"}
        if arguments[0] == "export":
            return {"bytes": 4_000_000, "bits_per_weight": 32, "parity": {}, "seconds": 1.0, "peak_rss_mb": 100.0}
        path = Path(arguments[arguments.index("--predictions") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = ["a", "b" if "int8" not in path.name else "c"]
        path.write_text("".join(json.dumps({"prediction": a}) + "\n" for a in answers), encoding="utf-8")
        baselines = {"baselines": {"copy": {"chrf": 10.0}}} if "--baseline" in arguments else {}
        return {
            "primary": "chrf", "scores": {"chrf": 30.0}, "latency_ms": {"median": 20.0, "p95": 40.0}, "examples": 2,
            "peak_rss_mb": 90.0, **baselines,
        }  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path) -> work.Plan:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid", "test"):
        (data / f"{name}.jsonl").write_text('{"source": "a", "target": "b"}\n' * 2, encoding="utf-8")
    base = work.base_of(500, 2, width=64, num_heads=2, num_kv_heads=2, recurrent_width=64, mlp_width=128)
    return work.Plan(
        task="translation", data=data, runs=tmp_path / "runs", result=tmp_path / "results" / "translation.json",
        base=base, patterns=("recurrent", "hybrid"), minutes=0.1,
    )  # fmt: skip


def measured(plan: work.Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Fakes]:
    fakes = Fakes()
    monkeypatch.setattr(work, "Commands", lambda total: fakes)
    return work.compare(plan, say=lambda text: None), fakes


@pytest.mark.parametrize("blocks", [3, 4])
@pytest.mark.parametrize("mlp_width", [0, 512])
def test_patterns_have_equally_many_parameters(blocks: int, mlp_width: int) -> None:
    base = work.base_of(4000, blocks, width=256, num_heads=4, num_kv_heads=4, recurrent_width=320, mlp_width=mlp_width)
    shapes = equal_sizes(base)
    counts = {name: parameters(shape) for name, shape in shapes.items()}
    assert all(abs(count / counts["hybrid"] - 1) <= TOLERANCE for count in counts.values())
    assert {name: set(shape.pattern) for name, shape in shapes.items()} == {n: set(k) for n, k in PATTERNS.items()}
    assert {len(shape.pattern) for shape in shapes.values()} == {blocks}


def test_patterns_that_cannot_be_equal_are_refused() -> None:
    base = work.base_of(10, 2, width=256, num_heads=4, num_kv_heads=4, recurrent_width=1, mlp_width=0)
    with pytest.raises(ConfigError, match=r"attention: .* choose other widths"):
        equal_sizes(base)


def test_comparison_measures_each_pattern_in_pytorch_and_as_bundles(
    plan: work.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, fakes = measured(plan, monkeypatch)
    kinds = [call[0] for call in fakes.calls]
    assert kinds == ["train", *["eval", "export"] * 3, "eval"] * 2
    assert sum("--baseline" in call for call in fakes.calls) == 1
    assert found == json.loads(plan.result.read_text(encoding="utf-8"))
    assert found["baselines"] == {"copy": {"chrf": 10.0}}
    assert found["rows"]["hybrid"]["float32"]["same_answers"] == 1
    assert found["rows"]["hybrid"]["int8"]["same_answers"] == 0.5
    assert found["rows"]["recurrent"]["train"]["command"].startswith("edgellm train ")
    assert found["environment"]["torch"]


def test_comparison_goes_on_where_it_was_stopped(plan: work.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = measured(plan, monkeypatch)
    del found["rows"]["hybrid"]["int8"]
    plan.result.write_text(json.dumps(found), encoding="utf-8")
    again, fakes = measured(plan, monkeypatch)
    assert [call[0] for call in fakes.calls] == ["eval"]
    assert again["rows"]["hybrid"]["int8"]["same_answers"] == 0.5
    assert measured(plan, monkeypatch)[1].calls == []


def test_another_training_makes_everything_after_it_again(plan: work.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = measured(plan, monkeypatch)
    found["rows"]["hybrid"]["train"]["command"] = "edgellm train with another seed"
    plan.result.write_text(json.dumps(found), encoding="utf-8")
    assert [call[0] for call in measured(plan, monkeypatch)[1].calls] == ["train", *["eval", "export"] * 3, "eval"]


def test_a_row_of_another_model_is_added(plan: work.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    monkeypatch.setattr(work, "Commands", lambda total: fakes)
    plan = dataclasses.replace(plan, base=None, patterns=(), options=("--init", "model.gguf", "--lora", "8"))
    found = work.add(plan, "fine-tuned")
    assert list(found["rows"]) == ["fine-tuned"]
    assert fakes.calls[0][-4:] == ["--init", "model.gguf", "--lora", "8"]
    assert "--set" not in fakes.calls[0]
    assert found["baselines"] == {"copy": {"chrf": 10.0}}
    assert "| fine-tuned, 1.00 M | w8a8 |" in table(found)


def test_tables_go_between_their_markers(plan: work.Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, _ = measured(plan, monkeypatch)
    text = table(found)
    assert "| copy |  | 10.00 |" in text
    assert "| hybrid, 1.00 M | int8 | 30.00 | 20.0 | 40.0 | 1.0x | 4.0 | 90 | 50.0% |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    page = render("# Page\n<!-- translation -->\nold\n<!-- /translation -->\nend\n", {"translation": text})
    assert page.startswith(f"# Page\n<!-- translation -->\n{text}<!-- /translation -->\nend")
    assert render(page, {"translation": text}) == page
    with pytest.raises(ValueError, match="no place for translation"):
        render("# Page", {"translation": text})
    draw({"translation": found}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_names_what_makes_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(compare.main, ["run", "srl", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert "make it with python examples/role_labelling/prepare.py" in done.output
    done = CliRunner().invoke(compare.main, ["run", "srl", "--patterns", "convolution"])
    assert "no pattern 'convolution'; known: recurrent, attention, hybrid" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("task", ["translation", "srl"])
def test_road_from_excerpt_to_equal_answers(task: str, tmp_path: Path) -> None:
    found = walk(task, tmp_path, steps=4, limit=4)
    assert found["pytorch"]["kind"] == "checkpoint"
    assert found["float32"]["kind"] == found["int8"]["kind"] == "bundle"
    assert found["pytorch"]["baselines"]
    assert found["pytorch"]["scores"] == pytest.approx(found["float32"]["scores"])
