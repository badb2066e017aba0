"""Training on examples: bad data, what is learned at which token, batches, adapters, configuration, budgets."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from task_models import LABELS, make, spec_of, tokenizer
from training_models import TEXT, run

from edgellm.checkpoints import load_checkpoint
from edgellm.cli.train import train as command
from edgellm.errors import CheckpointError, TrainingError
from edgellm.tasks.encode import Encoded, class_weights_of, encode_examples
from edgellm.tasks.examples import read_examples
from edgellm.training.adapter_files import ADAPTER, load_adapters
from edgellm.training.batches import Batch
from edgellm.training.distributed import World
from edgellm.training.example_batches import ExampleBatches
from edgellm.training.lora import AdaptedLinear, adapt, merged
from edgellm.training.loss import batch_loss
from edgellm.training.options import TrainOptions
from edgellm.training.run_config import RunConfig

PAIRS = [{"source": f"the cat saw {i} birds", "target": f"{i} birds saw the cat"} for i in range(24)]
SMALL = (
    "--set", "width=16", "--set", "pattern=gru,attention", "--set", "num_heads=2", "--set", "num_kv_heads=2",
    "--set", "recurrent_width=16", "--set", "mlp_width=0", "--vocab-size", "300", "--batch-tokens", "128",
    "--context", "64", "--threads", "1", "--device", "cpu", "--json",
)  # fmt: skip
GOOD_ROLES = {"words": ["a", "cat", "sat"], "predicate": 2, "labels": ["B-A0", "I-A0", "O"]}


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text).ids
    return ids


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call(*arguments: object) -> int:
    status: int | None = command.main([str(a) for a in arguments], standalone_mode=False)
    return status or 0


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        ("translation", "{", "not JSON"),
        ("translation", "[1]", "not an object"),
        ("translation", '{"source": "a"}', "'target' is not there"),
        ("translation", '{"source": " ", "target": "b"}', "'source' is empty"),
        ("translation", '{"source": "\\ud800", "target": "b"}', "half a surrogate pair"),
        ("qa", '{"context": "c", "question": "q", "answer": 3}', "'answer' is not there or no text"),
        ("qa", '{"context": "c", "question": "q", "answer": "", "answers": "x"}', "no list of texts"),
        ("summarization", '{"text": "a", "summary": ""}', "'summary' is empty"),
        ("srl", json.dumps({**GOOD_ROLES, "labels": ["B-A0", "O"]}), "not as many labels as words"),
        ("srl", json.dumps({**GOOD_ROLES, "labels": ["A0", "O", "O"]}), "use O, B-ROLE or I-ROLE"),
        ("srl", json.dumps({**GOOD_ROLES, "labels": ["B-A0", "I-A1", "O"]}), "begins with B-A1"),
        ("srl", json.dumps({**GOOD_ROLES, "predicate": 3}), "predicate 3 is outside the sentence"),
        ("srl", json.dumps({**GOOD_ROLES, "words": ["a", "", "b"]}), "'words' is no list of words"),
    ],
)
def test_a_malformed_line_is_told_with_its_number(task: str, line: str, said: str, tmp_path: Path) -> None:
    first = {"translation": PAIRS[0], "qa": {"context": "c", "question": "q", "answer": ""},
             "summarization": {"text": "t", "summary": "s"}, "srl": GOOD_ROLES}[task]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(first)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(TrainingError, match=said) as caught:
        read_examples(path, task)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_files_without_examples_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    for name, said in (("empty.jsonl", "holds no example"), ("none.jsonl", "cannot be read"), ("latin.jsonl", "UTF-8")):
        with pytest.raises(TrainingError, match=said):
            read_examples(tmp_path / name, "generation")


def test_the_answer_is_learned_and_the_prompt_as_much_as_is_asked_for() -> None:
    spec, example = spec_of("translation"), {"source": "the cat sat", "target": "the dog"}
    (row,) = encode_examples(spec, encode, tokenizer().token_to_id, 0, [example], prompt_loss=0.25).rows
    answer = [*encode("the dog"), 0]
    assert row.targets[-len(answer) :].tolist() == answer
    assert row.inputs[1:].tolist() == row.targets[:-1].tolist()
    assert row.weights.tolist() == [0.25] * (len(row.weights) - len(answer)) + [1.0] * len(answer)


def test_what_does_not_fit_is_shortened_or_dropped_and_counted() -> None:
    long = "the cat sat on the mat and the dog saw a bird in the old tree " * 3
    cut = encode_examples(
        spec_of("summarization"), encode, tokenizer().token_to_id, 0, [{"text": long, "summary": "a cat"}]
    )
    assert (len(cut.rows), cut.shortened, cut.dropped) == (1, 1, 0)
    rows = [{"source": long, "target": "a"}, {"source": "a", "target": long}, {"source": "a", "target": "a"}]
    kept = encode_examples(spec_of("translation"), encode, tokenizer().token_to_id, 0, rows)
    assert (len(kept.rows), kept.shortened, kept.dropped) == (1, 0, 2)


def test_rare_classes_count_more_and_all_together_as_before() -> None:
    examples = [{"context": "c", "question": "q", "answer": "yes" if i % 5 else "no"} for i in range(20)]
    weights = class_weights_of(spec_of("qa", choices=("no", "yes")), examples)
    assert weights["no"] / weights["yes"] == pytest.approx((16 / 4) ** 0.5)
    assert np.mean([weights[str(e["answer"])] for e in examples]) == pytest.approx(1)
    roles = class_weights_of(spec_of("srl"), [GOOD_ROLES, {**GOOD_ROLES, "labels": ["O", "B-A1", "O"]}])
    assert roles.keys() == {"O", "B-A0", "I-A0", "B-A1"} and roles["B-A1"] > roles["O"]
    assert class_weights_of(spec_of("translation"), PAIRS) == {}


def test_a_label_that_training_never_saw_is_not_learned() -> None:
    spec = spec_of("srl", labels=LABELS[:3])
    example = {**GOOD_ROLES, "labels": ["B-A0", "I-A0", "B-A1"]}
    (row,) = encode_examples(spec, encode, tokenizer().token_to_id, 0, [example]).rows
    assert row.weights.sum() == 2


def rows_of(lengths: list[int]) -> list[Encoded]:
    generator = np.random.default_rng(0)
    return [
        Encoded(*(generator.integers(1, 200, n).astype(np.int32) for _ in range(2)), np.ones(n, np.float32))
        for n in lengths
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), budget=st.integers(30, 200), seed=st.integers(0, 9)
)
def test_an_epoch_reads_every_example_once_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    rows = rows_of(lengths)
    source = ExampleBatches(rows, rows, vocab_size=200, width=200)
    options = TrainOptions(steps=1, batch_tokens=budget, seed=seed)
    world, read, step = World(0, 1, torch.device("cpu")), 0, 0
    seen: list[tuple[int, ...]] = []
    while read < len(rows):
        (batch,) = source.train(options, step, world)
        assert batch.inputs.numel() <= budget
        assert batch.weights is not None
        seen += [tuple(x[w > 0].tolist()) for x, w in zip(batch.inputs, batch.weights, strict=True)]
        read, step = read + len(batch.inputs), step + 1
    assert sorted(seen) == sorted(tuple(row.inputs.tolist()) for row in rows)


def test_loss_is_the_weighted_mean_of_what_counts() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    weights = torch.tensor([[0.0, 1, 2, 0, 1], [0.5, 0, 0, 0, 1]])
    found = batch_loss(logits, Batch(targets, targets, weights), label_smoothing=0.1)
    logp = logits.log_softmax(-1)
    each = -0.9 * logp.gather(-1, targets[..., None])[..., 0] - 0.1 * logp.mean(-1)
    assert found == pytest.approx(float((each * weights).sum() / weights.sum()), rel=1e-5)


@torch.no_grad()
def test_adapters_begin_as_nothing_and_merge_into_what_they_compute(tmp_path: Path) -> None:
    model, tokens = make(), torch.randint(0, 300, (2, 9))
    before = model(tokens)[0]
    adapt(model, 4, 8.0)
    torch.testing.assert_close(model(tokens)[0], before)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith((".up", ".down")) for n in trained)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.up.normal_()
    adapted = model(tokens)[0]
    assert not torch.allclose(adapted, before, atol=1e-2)
    with merged(model) as plain:
        assert not any(isinstance(m, AdaptedLinear) for m in plain.modules())
        torch.testing.assert_close(plain(tokens)[0], adapted, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, AdaptedLinear) for m in model.modules())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapters(model, tmp_path, None)
    with pytest.raises(TrainingError, match="rank is 0"):
        adapt(make(), 0, 1.0)


def test_a_checkpoint_is_tuned_with_adapters_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    assert call(data, "-o", tmp_path / "base", "--task", "translation", *SMALL, "--steps", 3) == 0
    begun = load_checkpoint(tmp_path / "base" / "best")
    how = (
        "--task", "translation", "--init", tmp_path / "base" / "best", "--lora", 2, "--context", 64,
        "--batch-tokens", 128, "--threads", 1, "--save-every", 2, "--json",
    )  # fmt: skip
    capsys.readouterr()
    assert call(data, "-o", tmp_path / "tuned", *how, "--steps", 4) == 0
    assert (tmp_path / "tuned" / "last" / ADAPTER / "adapter_model.safetensors").exists()
    assert call("-o", tmp_path / "tuned", "--resume", "--steps", 6, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 6
    tuned = load_checkpoint(tmp_path / "tuned" / "best")
    assert tuned.task is not None and tuned.task.name == "translation"
    names = {n: not torch.equal(p, dict(tuned.model.named_parameters())[n]) for n, p in begun.model.named_parameters()}  # type: ignore[union-attr]
    assert any(names.values()) and not names["embedding.weight"]
    (tmp_path / "tuned" / "last" / ADAPTER / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        call("-o", tmp_path / "tuned", "--resume", "--steps", 8, "--json")
    roles = jsonl(tmp_path / "roles.jsonl", [GOOD_ROLES] * 20)
    with pytest.raises(TrainingError, match="cannot be taught labels"):
        call(roles, "-o", tmp_path / "no", "--task", "srl", "--init", tmp_path / "base" / "best", "--steps", 1)


def test_options_come_from_a_file_and_the_command_line_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, config = tmp_path / "text.txt", tmp_path / "run.toml"
    text.write_text(TEXT, encoding="utf-8")
    config.write_text(
        "steps = 5\nbatch-size = 2\ncontext = 16\nvocab_size = 300\nthreads = 1\njson = true\n"
        '[set]\nwidth = 16\npattern = ["gru", "attention"]\nnum_heads = 2\nnum_kv_heads = 2\nrecurrent_width = 16\n'
        "mlp_width = 0\n",
        encoding="utf-8",
    )
    assert call(text, "-o", tmp_path / "run", "--config", config, "--steps", 3) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    kept = RunConfig.load(tmp_path / "run")
    assert kept.model["pattern"] == ["gru", "attention"] and kept.options.batch_size == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("steps = ", "is not TOML"),
        ("stepz = 3", "no option 'stepz'"),
        ("steps = 'many'", "steps: 'many' is not a valid integer"),
        ("steps = [1, 2]", "give one value"),
        ("precision = 'int3'", "'int3' is not one of"),
    ],
)
def test_a_wrong_configuration_is_told(content: str, said: str, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(content, encoding="utf-8")
    with pytest.raises(click.BadParameter, match=said):
        call("x.txt", "-o", tmp_path / "run", "--config", config)
    with pytest.raises(click.BadParameter, match="cannot be read"):
        call("x.txt", "-o", tmp_path / "run", "--config", tmp_path / "none.toml")


def test_a_budget_of_time_ends_the_run_at_the_lowest_rate(tmp_path: Path) -> None:
    start = time.perf_counter()
    result = run(tmp_path, tmp_path / "out", steps=1_000_000, minutes=0.05, eval_every=10_000, save_every=10_000)
    assert 0 < result.steps < 1_000_000
    assert time.perf_counter() - start < 60  # of which 3 are spent on updates
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert min(rates) < 0.2 * max(rates)


def test_a_run_that_no_longer_gets_better_ends(tmp_path: Path) -> None:
    # so high a rate that the loss rises at once
    result = run(tmp_path, tmp_path / "out", steps=200, lr=3.0, warmup=0, clip=0.0, eval_every=2, patience=3)
    assert result.steps < 200
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    assert losses[-4] == min(losses)


def test_a_range_test_suggests_a_rate_and_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    assert call(data, "-o", tmp_path / "out", "--task", "translation", *SMALL, "--find-lr") == 0
    found = json.loads(capsys.readouterr().out)
    assert 1e-4 < found["suggested"] < 1
    assert found["rates"] == sorted(found["rates"])
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"lr-range.png"}


def test_padding_changes_nothing_that_is_learned() -> None:
    rows = rows_of([3, 9])
    model = make()
    both = ExampleBatches._batch(rows, np.array([0, 1]), World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        together = batch_loss(model(both.inputs)[0], both)
        alone = [
            F.cross_entropy(model(torch.tensor(row.inputs[None]).long())[0][0], torch.tensor(row.targets).long())
            for row in rows
        ]
    assert together == pytest.approx(float(3 * alone[0] + 9 * alone[1]) / 12, rel=1e-4)
