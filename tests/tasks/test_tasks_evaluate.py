"""A model at its task: what is asked, what is counted, and what the command line refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generation_fakes import byte_level
from tiny_bundles import attention_bundle, recurrent_bundle, text_assets

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm.cli.eval_task import open_runner, print_report
from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm.tasks.evaluate import evaluate_baselines, evaluate_task
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.task_spec import Segment, TaskSpec

TRANSLATION = TaskSpec(name="translation", prompt=(Segment("field", "source"),))
PAIRS = [{"source": f"word {i}", "target": f"Wort {i}"} for i in range(24)]


class Upper:
    """Translates every third sentence wrongly, less sure of it; refuses long ones."""

    spec = TRANSLATION

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def translate(self, source: str, **options: Any) -> SimpleNamespace:
        self.asked.append((source, options))
        if len(source) > 20:
            raise ContextError("too long")
        number = int(source.split()[1])
        wrong = number % 3 == 0
        return SimpleNamespace(text="xyz" if wrong else f"Wort {number}", confidence=0.2 if wrong else 0.9)


class Guesser:
    """A session whose every next token is the same, and a tokenizer of bytes."""

    vocab_size = width = 257
    max_context, chunk, eos_token_id, predicts_tokens, encoder, one_pass = 64, 512, 256, True, None, False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def new_state(self, batch: int, capacity: int) -> list[int]:
        return []

    def step(self, tokens: np.ndarray, state: list[int], *, logits: str = "last") -> np.ndarray:
        return np.zeros((1, tokens.shape[1] if logits == "all" else 1, self.vocab_size), dtype=np.float32)


def test_examples_are_asked_one_by_one_and_the_first_once_more_to_warm_up() -> None:
    runner, shares = Upper(), []
    report = evaluate_task(runner, "translation", PAIRS, beams=2, progress=shares.append)
    assert runner.asked == [(e["source"], {"beams": 2}) for e in [PAIRS[0], *PAIRS]]
    assert report.examples == len(report.predictions) == 24
    assert report.primary == "chrf"
    assert 0 < report.latency_ms["median"] <= report.latency_ms["p95"]
    assert shares[-1] == 1
    assert [p.value for p in report.predictions[:3]] == ["xyz", "Wort 1", "Wort 2"]


def test_surer_half_scores_higher_where_confidence_is_worth_something() -> None:
    sure = evaluate_task(Upper(), "translation", PAIRS).confidence
    assert sure["mean"] == pytest.approx((8 * 0.2 + 16 * 0.9) / 24)
    assert sure["surer_half"] == pytest.approx(100)
    assert sure["other_half"] < 80
    assert evaluate_task(Upper(), "translation", PAIRS[:10]).confidence == {}


def test_what_the_model_cannot_take_counts_as_wrong() -> None:
    runner = Upper()
    long = {"source": "a sentence that is far too long", "target": "ein Satz"}
    report = evaluate_task(runner, "translation", [PAIRS[1], long])
    assert report.refused == 1
    assert report.predictions[1].value == "\ufffd"
    assert report.scores["chrf"] < 80
    assert runner.asked[0][1] == {}  # as many beams as the runner likes
    with pytest.raises(OptionError, match="none of 1 examples can be answered; the first: too long"):
        evaluate_task(runner, "translation", [long])
    with pytest.raises(OptionError, match="no examples"):
        evaluate_task(runner, "translation", [])


def test_refusal_is_not_the_answer_that_there_is_none() -> None:
    def answer(question: str, context: str) -> SimpleNamespace:
        if question == "long":
            raise ContextError("too long")
        return SimpleNamespace(text="", confidence=1.0)

    runner = SimpleNamespace(answer=answer, spec=TaskSpec(name="qa", no_answer="none"))
    examples = [{"context": "c", "question": q, "answer": "none"} for q in ("short", "long")]
    assert evaluate_task(runner, "qa", examples).scores["f1"] == 50
    runner.spec = TaskSpec(name="qa", no_answer="none", choices=("yes", "none"))
    assert evaluate_task(runner, "qa", examples).scores == {"accuracy": 50}


def test_text_is_scored_in_bits_per_byte() -> None:
    guesser = Guesser()
    runner = SimpleNamespace(session=guesser, tokenizer=guesser, spec=None)
    report = evaluate_task(runner, "generation", [{"text": "x" * 99}], window=50)
    # 100 tokens with the one that ends the text, each of log2 257 bits, for 99 bytes
    assert report.scores["bits_per_byte"] == pytest.approx(math.log2(257) * 100 / 99, rel=1e-6)
    assert report.scores["perplexity"] == pytest.approx(257, rel=1e-5)
    assert report.latency_ms["median"] > 0
    assert report.predictions == ()
    baselines = evaluate_baselines(runner, "generation", [{"text": "x" * 500}], [{"text": "x" * 99}], window=50)
    assert baselines["trigrams"]["bits_per_byte"] < 0.2
    assert baselines["trigrams"]["bits_per_byte"] < baselines["unigrams"]["bits_per_byte"] < 2


def test_baselines_are_scored_as_the_model_is() -> None:
    found = evaluate_baselines(Upper(), "translation", PAIRS, [{"source": "word 3", "target": "Wort 3"}])
    assert found["word by word"]["chrf"] == pytest.approx(100)
    assert found["copy of the source"]["chrf"] < 100


def test_report_says_what_people_want_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_task(Upper(), "translation", PAIRS)
    shown = [{"asked": "word 0", "wanted": "Wort 0", "found": "xyz"}]
    baselines = {"copy of the source": {"chrf": 12.345}}
    print_report({"model": "b", "kind": "bundle", **report.to_json(), "baselines": baselines, "shown": shown})
    printed = capsys.readouterr().out
    for fact in ("translation", "24", "chrf", "without a model: copy of the source  chrf 12.35", "of the surer half",
                 "ms median", "found  xyz"):  # fmt: skip
        assert fact in printed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that translates, badly, and its bundle."""
    folder = tmp_path_factory.mktemp("models")
    text = text_assets()
    torch.manual_seed(3)
    vocab_size = byte_level().get_vocab_size()
    config = HybridConfig(vocab_size=vocab_size, width=32, pattern=("gru", "attention"), num_heads=2, num_kv_heads=2,
                          recurrent_width=32, max_context=96)  # fmt: skip
    model = Hybrid(config).eval()
    task = TaskSpec(name="translation", prompt=(Segment("field", "source"), Segment("text", "=")), max_new_tokens=5)
    save_checkpoint(
        folder / "checkpoint", model, architecture="hybrid", tokenizer_json=text.tokenizer_json,
        eos_token_ids=text.eos_token_ids, task=task,
    )  # fmt: skip
    export(model, folder / "bundle", options=ExportOptions(), text=dataclasses.replace(text, task=task))
    return folder / "checkpoint", folder / "bundle"


def test_checkpoint_and_bundle_give_the_same_answers(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, found = tmp_path / "test.jsonl", []
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    for model in models:
        answers = tmp_path / f"{model.name}.jsonl"
        words = ("--task", "translation", "--data", data, "--limit", 5, "--predictions", answers, "--baseline", data)
        assert run(["eval", str(model), *map(str, words), "--threads", "1", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        assert result["kind"] == model.name
        assert result["examples"] == len(lines) == 5
        assert result["baselines"]["word by word"]["chrf"] == pytest.approx(100)
        assert result["shown"][0]["found"] == lines[0]["prediction"]
        found.append((result["scores"], [line["prediction"] for line in lines], lines[0]["confidence"]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-3)


def test_model_of_another_task_is_refused(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for model in models:
        with pytest.raises(OptionError, match="its task is translation, not qa; give --task translation"):
            open_runner(model, "qa")
    with pytest.raises(OptionError, match="has no tokenizer"):
        open_runner(recurrent_bundle(), "generation")
    with pytest.raises(OptionError, match="its task is generation, not srl"):
        open_runner(attention_bundle(), "srl")
    runner, kind = open_runner(attention_bundle(), "generation", threads=1)
    assert kind == "bundle"
    assert evaluate_task(runner, "generation", [{"text": "one two three " * 9}]).scores["bits_per_byte"] > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --text FILE, or --task NAME and --data FILE"),
        (("--task", "translation", "--text", "x.txt", "--data", "d"), "--text goes without --task"),
        (("--task", "translation", "--against", "c", "--data", "d"), "--against goes without --task"),
        (("--task", "translation"), "--task needs its test data: --data FILE"),
        (("--text", "x.txt", "--limit", "3"), "--limit belongs to --task NAME"),
        (("--text", "x.txt", "--baseline", "t"), "--baseline belongs to --task NAME"),
        (("--task", "translation", "--data", "d", "--limit", "0"), "Invalid value for '--limit'"),
    ],
    ids=["nothing", "both", "against", "no data", "limit", "baseline", "zero"],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "bundle", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_malformed_data_is_told_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps(PAIRS[0]) + '\n{"source": "x"}\n', encoding="utf-8")
    assert run(["eval", str(tmp_path), "--task", "translation", "--data", str(data)]) == 1
    assert f"{data}:2" in capsys.readouterr().err
    assert run(["eval", str(tmp_path), "--task", "cooking", "--data", str(data)]) == 1
    assert "unknown task 'cooking'; known: generation" in capsys.readouterr().err
