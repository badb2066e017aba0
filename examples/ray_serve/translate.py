"""Translate the lines of a file on a Ray cluster; what was killed goes on where it was.

    python examples/ray_serve/translate.py /shared/translator /shared/lines.txt /shared/out --replicas 8

The file is cut into blocks of lines. Each is translated by one of the replicas and then lies in the folder as a part of
its own, whole or not at all; at the next start only blocks without a part are translated. At the end the parts are put
together: line 17 of ``translations.txt`` is line 17's translation. Lines that could not be translated are empty there,
and in ``refused.jsonl`` with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_runtime import ContextError, Model, OptionError, load
from edgellm_runtime.bundle import Bundle

__all__ = ["Block", "Plan", "PlanError", "Translator", "join", "main", "make_plan"]


class PlanError(Exception):
    """The folder is of another work, or of a file that has changed."""


@dataclass(frozen=True)
class Block:
    """Lines that are translated together.

    Args:
        number: of the block.
        start: where its first line begins in the file, in bytes.
        lines: how many.
    """

    number: int
    start: int
    lines: int

    def part(self, folder: Path) -> Path:
        """Where its translations lie once they are whole."""
        return folder / "parts" / f"{self.number:08d}.jsonl"


@dataclass(frozen=True)
class Plan:
    """What is to be done, by which a folder of other work is told.

    Args:
        source: sha256 of the file.
        bundle: fingerprint of the model's bundle.
        lines: of the file.
        block: lines of a block.
        beams: of the search.
    """

    source: str
    bundle: str
    lines: int
    block: int
    beams: int


def make_plan(bundle: Path, source: Path, folder: Path, *, block: int, beams: int) -> tuple[Plan, list[Block]]:
    """The plan and all its blocks; the folder is made, or found to be of the same plan.

    Raises:
        PlanError: it is of another one.
    """
    digest, blocks, start, lines, at = hashlib.sha256(), list[Block](), 0, 0, 0
    with source.open("rb") as file:
        for line in file:
            digest.update(line)
            at, lines = at + len(line), lines + 1
            if lines % block == 0:
                blocks.append(Block(len(blocks), start, block))
                start = at
    if lines % block:
        blocks.append(Block(len(blocks), start, lines % block))
    plan = Plan(digest.hexdigest(), Bundle(bundle).fingerprint, lines, block, beams)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    kept = folder / "plan.json"
    if not kept.exists():
        _write(kept, json.dumps(dataclasses.asdict(plan), allow_nan=False))
    found = json.loads(kept.read_text(encoding="utf-8"))
    if differs := [name for name, value in dataclasses.asdict(plan).items() if found.get(name) != value]:
        raise PlanError(f"{folder} is of other work: {', '.join(differs)} differ; name another folder, or empty it")
    return plan, blocks


class Translator:
    """A replica: holds a model, and translates the blocks that it is handed.

    Args:
        bundle: of the model.
        source: the file with the lines.
        folder: for the parts.
        beams: of the search.
        threads: CPU threads.
        rows: lines that are translated at once.
    """

    def __init__(
        self, bundle: Path, source: Path, folder: Path, *, beams: int, threads: int | None = None, rows: int = 16
    ) -> None:
        self._model: Model = load(bundle, threads=threads)
        self._source, self._folder, self._beams, self._rows = source, folder, beams, rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Translate blocks, given as columns of their numbers; gives their numbers and how many lines were refused."""
        columns = zip(*(map(int, batch[field.name]) for field in dataclasses.fields(Block)), strict=True)
        blocks = [Block(*row) for row in columns]
        return {"number": [block.number for block in blocks], "refused": [self.translate(block) for block in blocks]}

    def translate(self, block: Block) -> int:
        """Write a block's part; gives how many of its lines were refused."""
        with self._source.open("rb") as file:
            file.seek(block.start)
            lines = [file.readline().decode("utf-8", errors="replace").strip() for _ in range(block.lines)]
        found: dict[int, dict[str, Any]] = {i: {"text": ""} for i, line in enumerate(lines) if not line}
        # Lines of like length together: a batch takes as long as its longest row.
        order = sorted((i for i in range(len(lines)) if i not in found), key=lambda i: len(lines[i]))
        for first in range(0, len(order), self._rows):
            rows = order[first : first + self._rows]
            found.update(zip(rows, self._answers([lines[i] for i in rows]), strict=True))
        _write(block.part(self._folder), "".join(_json(found[i]) for i in range(len(lines))))
        return sum("error" in value for value in found.values())

    def _answers(self, texts: list[str]) -> list[dict[str, Any]]:
        """A translation of each, or why there is none; one that is refused does not hold up the others."""
        try:
            answers = self._model.translate(texts, beams=self._beams)
        except (OptionError, ContextError) as error:
            if len(texts) == 1:
                return [{"text": "", "error": str(error)}]
            return [self._answers([text])[0] for text in texts]
        return [{"text": " ".join(a.text.split()), "confidence": round(a.confidence, 4)} for a in answers]


def join(plan: Plan, blocks: Sequence[Block], folder: Path) -> int:
    """Put the parts together, in order; gives how many lines were refused.

    Raises:
        PlanError: a part has not as many lines as its block.
    """
    refused = 0
    texts, reasons = folder / "translations.txt.new", folder / "refused.jsonl.new"
    with texts.open("w", encoding="utf-8") as out, reasons.open("w", encoding="utf-8") as no:
        for block in blocks:
            with block.part(folder).open(encoding="utf-8") as part:
                lines = list(part)  # and not splitlines, which knows more ends of lines than JSON escapes
            if len(lines) != block.lines:
                raise PlanError(
                    f"{block.part(folder)} has {len(lines)} lines, not {block.lines}; delete it, start again"
                )
            for i, line in enumerate(lines):
                value = json.loads(line)
                out.write(value["text"] + "\n")
                if "error" in value:
                    refused += 1
                    no.write(_json({"line": block.number * plan.block + i + 1, "error": value["error"]}))
    texts.replace(folder / "translations.txt")
    reasons.replace(folder / "refused.jsonl")
    return refused


def run(
    blocks: Sequence[Block], translator: dict[str, Any], *, replicas: int, threads: int
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Translate blocks on the cluster; gives the number of each that is done, and its refused lines, as they come."""
    import ray.data

    items = [dataclasses.asdict(block) for block in blocks]
    data = ray.data.from_items(items, override_num_blocks=min(len(items), 10_000)).map_batches(
        Translator, fn_constructor_kwargs=translator, batch_size=1, num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(size=replicas),
    )  # fmt: skip
    for row in data.iter_rows():
        yield row["number"], row["refused"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Translate the lines of a file on a Ray cluster.")
    parser.add_argument("bundle", type=Path, help="of a translator; every node has it at this path")
    parser.add_argument("source", type=Path, help="file of lines, which every node has at this path")
    parser.add_argument("folder", type=Path, help="for the parts and the result; every node writes to it")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a replica, and the cores that Ray keeps for it")
    parser.add_argument("--block", type=int, default=1000, help="lines that are done or not done at a kill")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--address", help="of the cluster; else the one that Ray finds, or one of this machine alone")
    given = parser.parse_args(arguments)

    bundle, source, folder = (path.resolve() for path in (given.bundle, given.source, given.folder))
    plan, blocks = make_plan(bundle, source, folder, block=given.block, beams=given.beams)
    missing = [block for block in blocks if not block.part(folder).exists()]
    print(f"{plan.lines:,} lines, {len(blocks) - len(missing):,} of {len(blocks):,} blocks are done", flush=True)
    if missing:
        import ray

        ray.init(address=given.address, log_to_driver=False)
        translator = {
            "bundle": bundle, "source": source, "folder": folder, "beams": given.beams, "threads": given.threads
        }  # fmt: skip
        for done, (number, _) in enumerate(run(missing, translator, replicas=given.replicas, threads=given.threads), 1):
            print(f"block {number}: {done} of {len(missing)}", flush=True)
    refused = join(plan, blocks, folder)
    print(f"{folder / 'translations.txt'}: {plan.lines:,} lines, {refused:,} refused")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whoever is killed; a replica that does a block a second time writes the same."""
    draft = path.with_suffix(f".{hashlib.sha256(text.encode()).hexdigest()[:8]}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
