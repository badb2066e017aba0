"""The measurements as Markdown tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["SCORES", "draw", "line", "number", "render", "table"]

Result = Mapping[str, Any]

_RUNS = {"pytorch": "PyTorch", "float32": "float32", "int8": "int8", "w8a8": "w8a8"}
SCORES = {
    "chrf": "chrF", "bleu": "BLEU", "accuracy": "accuracy", "f1": "F1", "exact_match": "exact match",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "length_deviation": "words off",
    "span_precision": "span precision", "span_recall": "span recall",
    "span_f1": "span F1", "word_accuracy": "word accuracy", "bits_per_byte": "bits per byte",
    "perplexity": "perplexity", "f1_answerable": "F1 answerable", "no_answer_accuracy": "no answer",
}  # fmt: skip
_COLOURS = {"recurrent": "#d64545", "attention": "#2b6cb0", "hybrid": "#2f855a"}
_MARKS = {"pytorch": "o", "float32": "s", "int8": "^", "w8a8": "D"}
INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"


def render(page: str, tables: Mapping[str, str]) -> str:
    """A page with each table between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Args:
        page: in Markdown.
        tables: by name.

    Raises:
        ValueError: the page has no such place for one of them.
    """
    for task, text in tables.items():
        before, begin, rest = page.partition(f"<!-- {task} -->")
        _, end, after = rest.partition(f"<!-- /{task} -->")
        if not begin or not end:
            raise ValueError(f"the page has no place for {task}; write <!-- {task} --> and <!-- /{task} --> into it")
        page = f"{before}{begin}\n{text}{end}{after}"
    return page


def table(result: Result) -> str:
    """A task's rows: what needs no model, then each pattern in PyTorch and as bundles."""
    scores = _columns(result)
    head = [
        "model",
        "runs in",
        *(SCORES.get(s, s) for s in scores),
        "ms",
        "p95 ms",
        "faster",
        "MB on disk",
        "MB in use",
        "same answers",
    ]
    lines = [line(head), line(["---"] * len(head))]
    for name, found in result.get("baselines", {}).items():
        lines.append(line([name, "", *(number(found.get(s)) for s in scores), *[""] * 6]))
    for name, row in result["rows"].items():
        lines += [line(_cells(name, key, row, scores)) for key in _RUNS if key in row]
    return "\n".join(lines) + f"\n\n{_note(result)}\n"


def _columns(result: Result) -> list[str]:
    found: dict[str, None] = {}
    for _, _, run in _runs(result):
        found |= dict.fromkeys(run["scores"])
    return list(found)


def _runs(result: Result) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    return ((name, key, row[key]) for name, row in result["rows"].items() for key in _RUNS if key in row)


def _cells(name: str, key: str, row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    run, reference = row[key], row.get("pytorch")
    size = row.get(f"{key} export", {}).get("bytes")
    faster = (
        reference["latency_ms"]["median"] / run["latency_ms"]["median"] if reference and run is not reference else None
    )
    same = run.get("same_answers")
    return [
        f"{name}, {row['train']['parameters'] / 1e6:.2f} M", _RUNS[key],
        *(number(run["scores"].get(s)) for s in scores),
        f"{run['latency_ms']['median']:.1f}", f"{run['latency_ms']['p95']:.1f}", f"{faster:.1f}x" if faster else "",
        f"{size / 1e6:.1f}" if size else "", f"{run['peak_rss_mb'] or 0:.0f}", "" if same is None else f"{same:.1%}",
    ]  # fmt: skip


def _note(result: Result) -> str:
    where, data = result["environment"], result["data"]
    asked = next((run["examples"] for _, _, run in _runs(result)), 0)
    return (
        f"{result['minutes']:g} minutes of training each on {data['train']:,} examples, {asked:,} test examples, seed "
        f"{result['seed']}, threads: {result['threads']}; {where['processor']}, PyTorch {where['torch']}, ONNX Runtime "
        f"{where['onnxruntime']}, {where['date']}."
    )


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """A score with the digits that mean something; nothing for None."""
    return "" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def draw(results: Mapping[str, Result], path: Path) -> None:
    """One panel a task: the primary score over the time of an example, by pattern and by what runs it.

    Args:
        results: by task.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * lines + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    for axes, (task, result) in zip(panels, results.items(), strict=False):
        _panel(axes, task, result)
    figure.legend(*_legend(results), loc="outside lower center", ncols=8, frameon=False, labelcolor=INK)
    pending = path.with_name(path.name + ".tmp")
    figure.savefig(pending, format="png", facecolor="white")
    pending.replace(path)


def _panel(axes: Any, task: str, result: Result) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    main = next((run["primary"] for _, _, run in _runs(result)), "")
    for name, row in result["rows"].items():
        runs = {key: row[key] for key in _RUNS if key in row}
        times, scores = [r["latency_ms"]["median"] for r in runs.values()], [r["scores"][main] for r in runs.values()]
        colour = _COLOURS.get(name, INK)
        axes.plot(times, scores, color=colour, linewidth=1, alpha=0.4)
        for key, x, y in zip(runs, times, scores, strict=True):
            axes.plot(x, y, _MARKS[key], color=colour, markersize=8, markeredgecolor="white")
    for name, scores in result.get("baselines", {}).items():
        axes.axhline(scores[main], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(name, (0.98, scores[main]), xycoords=("axes fraction", "data"), xytext=(0, 2),
                      textcoords="offset points", ha="right", color=QUIET, fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("median time of one example, ms", color=QUIET)
    direction = "lower is better" if task == "generation" else "higher is better"
    axes.set_title(f"{task}: {SCORES.get(main, main)}\n({direction})", loc="left", color=INK, fontsize=11)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=QUIET, which="both", length=0)


def _legend(results: Mapping[str, Result]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    runs = [key for key in _RUNS if any(key == used for r in results.values() for _, used, _ in _runs(r))]

    marks = [Line2D([], [], marker="o", linestyle="", markersize=8, color=colour) for colour in _COLOURS.values()]
    marks += [
        Line2D([], [], marker=mark, linestyle="", markersize=8, color=QUIET) for mark in map(_MARKS.__getitem__, runs)
    ]
    return marks, [
        *_COLOURS,
        *(name if name == "PyTorch" else f"bundle, {name}" for name in map(_RUNS.__getitem__, runs)),
    ]
