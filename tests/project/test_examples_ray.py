"""The parts of examples/ray_serve that need no Ray: what is done, what is not, and how it is put together."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from task_models import bundle, make, spec_of

from edgellm_runtime import Model

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # the examples are programs, not a package

from ray_serve import translate  # noqa: E402

LINES = ["the cat sat", "", "a bird in the old tree", "the dog " * 40, "the mat\u2028and the dog", "our house"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bundle(tmp_path_factory.mktemp("translator"), make(), spec_of("translation"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")  # the last line has no end
    return path


@pytest.fixture
def in_order(model: Model, source: Path, tmp_path: Path) -> Any:
    """Runs blocks one after the other, in the place of a cluster, and remembers which."""
    done: list[int] = []

    def run(blocks: Any, translator: dict[str, Any], *, replicas: int, threads: int) -> Any:
        made = translate.Translator(**translator)
        for block in blocks:
            done.append(block.number)
            columns = {field.name: [getattr(block, field.name)] for field in dataclasses.fields(block)}
            found = made(columns)
            yield found["number"][0], found["refused"][0]

    return run, done


def start(model: Model, source: Path, out: Path, *more: str) -> None:
    translate.main([str(model.bundle.path), str(source), str(out), "--block", "2", "--beams", "1", *more])


def test_each_line_has_its_translation_and_a_refused_one_its_reason(
    model: Model, source: Path, tmp_path: Path, in_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translate, "run", in_order[0])
    monkeypatch.setitem(sys.modules, "ray", _NoRay)
    start(model, source, tmp_path / "out")
    found = (tmp_path / "out/translations.txt").read_text(encoding="utf-8").split("\n")
    assert found.pop() == ""
    refused = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in refused] == [4]
    assert "32" in refused[0]["error"]
    for i in (0, 2, 4, 5):
        assert found[i] == " ".join(model.translate(LINES[i], beams=1).text.split())
    assert found[1] == found[3] == ""
    assert len(found) == len(LINES)


def test_what_is_done_is_not_done_again(
    model: Model, source: Path, tmp_path: Path, in_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = in_order
    out = tmp_path / "out"

    def killed(blocks: Any, translator: Any, **options: Any) -> Any:
        yield from run(blocks[:1], translator, **options)
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "ray", _NoRay)
    monkeypatch.setattr(translate, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        start(model, source, out)
    assert not (out / "translations.txt").exists()
    (out / "parts/00000001.0f.new").write_text("half a part", encoding="utf-8")  # of a replica that was killed
    monkeypatch.setattr(translate, "run", run)
    start(model, source, out)
    assert done == [0, 1, 2]
    start(model, source, out)  # all is there: only put together again
    assert done == [0, 1, 2]
    assert len((out / "translations.txt").read_text(encoding="utf-8").split("\n")) == len(LINES) + 1


@pytest.mark.parametrize("what", ["source", "beams", "block"])
def test_a_folder_of_other_work_is_refused(model: Model, source: Path, tmp_path: Path, what: str) -> None:
    plan = {"block": 2, "beams": 1}
    translate.make_plan(model.bundle.path, source, tmp_path / "out", **plan)
    if what == "source":
        source.write_text("another", encoding="utf-8")
    with pytest.raises(translate.PlanError, match=what):
        translate.make_plan(
            model.bundle.path, source, tmp_path / "out", **{**plan, **({what: 3} if what in plan else {})}
        )


def test_a_part_of_another_length_is_refused(model: Model, source: Path, tmp_path: Path) -> None:
    plan, blocks = translate.make_plan(model.bundle.path, source, tmp_path, block=6, beams=1)
    blocks[0].part(tmp_path).write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(translate.PlanError, match="has 1 lines, not 6"):
        translate.join(plan, blocks, tmp_path)


@pytest.mark.parametrize(("count", "block"), [(0, 3), (1, 3), (3, 3), (7, 3), (9, 1)])
def test_blocks_hold_every_line_once(model: Model, tmp_path: Path, count: int, block: int) -> None:
    source, lines = tmp_path / "lines.txt", [f"é{i}" for i in range(count)]
    source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    plan, blocks = translate.make_plan(model.bundle.path, source, tmp_path / "out", block=block, beams=1)
    found = []
    for one in blocks:
        with source.open("rb") as file:
            file.seek(one.start)
            found += [file.readline().decode().rstrip("\n") for _ in range(one.lines)]
    assert found == lines
    assert plan.lines == count


class _NoRay:
    """Stands for the library, of which only a beginning is asked for here."""

    @staticmethod
    def init(**options: Any) -> None:
        assert options["address"] is None
