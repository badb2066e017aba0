"""docs/families.md: written from what came of each row, and read again when only some rows are tried."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from family_checks.check import CLOSE, GREEDY, LENGTHS, TARGETS, Outcome

__all__ = ["Row", "read", "refusals", "render"]

Row = tuple[str, Mapping[str, Outcome]]  # the road, and what came of each target

_HEAD = """# Every family of transformers that was tried

One row for each causal family of transformers, and for settings of some that change what is computed. Each is built by
transformers at tiny size (2 layers, width 36 or 64, vocabulary {vocab}, context {context}, windows of {window}) with
scrambled weights, saved, read as `edgellm export` reads it, exported, and held to transformers. `make families` does it
anew and writes this page; `FAMILIES='llama gpt2'` tries some rows and leaves the others as they are.

*Works* says that the export was proved; that the bundle's logits are within {close:g} of transformers' over texts of
{short} and {long} tokens, read whole, token by token, in chunks, and as a ragged batch of three; and that {greedy}
greedy tokens are the same. In brackets the largest difference, and the largest logit. *Refused* is followed by what the
command says. No row may be wrong, and none may end in a traceback.

Measured with torch {torch}, transformers {transformers} and ONNX Runtime {onnxruntime}, on {machine}.

Of {count} rows: {summary}.

A *native* row was read by a file in `edgellm/models/`, a *general* one through transformers, see
[README.md](../README.md).

| family | road | {targets} |
|---|---|{bars}
"""


def render(rows: Mapping[str, Row], *, vocab: int, context: int, window: int) -> str:
    """The page.

    Args:
        rows: by name, in their order.
        vocab: of the models.
        context: of the models.
        window: of those that have one.
    """
    import torch
    import transformers

    head = _HEAD.format(
        vocab=vocab, context=context, window=window, close=CLOSE, short=LENGTHS[0], long=LENGTHS[1], greedy=GREEDY,
        torch=torch.__version__.partition("+")[0], transformers=transformers.__version__,
        onnxruntime=metadata.version("onnxruntime"), machine=f"{platform.system()}, {platform.machine()}",
        count=len(rows),
        summary="; ".join(_summary(target, rows) for target in TARGETS),
        targets=" | ".join(f"`{target}`" for target in TARGETS), bars="---|" * len(TARGETS),
    )  # fmt: skip
    return head + "".join(_line(name, *row) for name, row in rows.items())


def refusals(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What ``edgellm models`` tells of types of which every row was refused on every target.

    Args:
        rows: by name.
    """
    import transformers

    types: dict[str, str] = {}
    worked: set[str] = set()
    for name, (_, outcomes) in rows.items():
        kind = name.partition("(")[0]
        if all(outcome.word == "refused" for outcome in outcomes.values()):
            types[kind] = outcomes[TARGETS[0]].more.removeprefix(f"{kind}: ")
        else:
            worked.add(kind)
    return {
        "transformers": transformers.__version__, "types": {k: why for k, why in types.items() if k not in worked},
    }  # fmt: skip


def _summary(target: str, rows: Mapping[str, Row]) -> str:
    words = Counter(outcomes[target].word for _, outcomes in rows.values())
    other = len(rows) - words["works"] - words["refused"]
    share = 100 * words["works"] / max(1, len(rows))
    return (
        f"`{target}`: {words['works']} work ({share:.0f}%), {words['refused']} are refused, {other} are wrong or end "
        "otherwise"
    )


def _line(name: str, road: str, outcomes: Mapping[str, Outcome]) -> str:
    cells, before = [], ""
    for target in TARGETS:
        outcome = outcomes[target]
        more = outcome.more.replace("|", "\\|")
        cell = f"works ({more})" if outcome.word == "works" else f"{outcome.word}: {more}"
        cells.append(f"{outcome.word}: the same" if outcome.word != "works" and cell == before else cell)
        before = cell
    return f"| {' | '.join((name, road, *cells))} |\n"


def read(page: Path) -> dict[str, Row]:
    """The rows of a page that :func:`render` made; none where there is no page.

    Args:
        page: the file.
    """
    if not page.exists():
        return {}
    found: dict[str, Row] = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|"))
        if not line.startswith("| ") or name == "family" or len(cells) != 1 + len(TARGETS):
            continue
        found[name] = cells[0], _outcomes([cell.replace("\0", "|") for cell in cells[1:]])
    return found


def _outcomes(cells: Sequence[str]) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    last = Outcome("", "")
    for target, cell in zip(TARGETS, cells, strict=True):
        word, _, more = cell.partition(": ")
        if cell.startswith("works ("):
            word, more = "works", cell.removeprefix("works (").removesuffix(")")
        last = last if more == "the same" else Outcome(word, more)
        found[target] = last
    return found
