"""Training a model that labels words in one pass: what it reads, and a run from examples to a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tagger_models import tagger
from task_models import LABELS, bundle, in_pytorch, spec_of, tokenizer
from test_tasks_training import PAIRS, call, encode, jsonl

from edgellm.checkpoints import load_checkpoint
from edgellm.cli import run
from edgellm.errors import TrainingError
from edgellm.tasks.encode import encode_examples
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime import load
from edgellm_runtime.task_spec import PREDICATE
from edgellm_runtime.tasks.runner import TaskRunner

ROLES = [
    {"words": [f"w{i % 5}", "cat", verb, "the", f"w{i % 7}"], "predicate": 2,
     "labels": ["B-A0" if verb == "saw" else "B-A1", "O", "O", "B-A1", "I-A1"]}
    for i in range(60) for verb in ("saw", "sat")
]  # fmt: skip
SMALL = (
    "--architecture", "tagger", "--set", "width=32", "--set", "num_heads=2", "--set", "recurrent_width=24",
    "--set", "mlp_width=48", "--vocab-size", "300", "--batch-tokens", "256", "--context", "64", "--threads", "1",
    "--device", "cpu", "--json",
)  # fmt: skip


def test_words_are_read_once_and_the_label_is_at_each_ones_last_token() -> None:
    example = {"words": ["a", "cat", "sat"], "predicate": 1, "labels": ["O", "B-A0", "I-A0"]}
    given = spec_of("srl"), encode, tokenizer().token_to_id, 0, [example]
    once, twice = (encode_examples(*given, once=one).rows[0] for one in (True, False))
    words = [encode(f" {word}") for word in example["words"]]
    words[1].insert(0, tokenizer().token_to_id(PREDICATE))
    assert once.inputs.tolist() == [token for word in words for token in word]
    assert len(twice.inputs) == 2 * len(once.inputs) + 1
    ends = np.cumsum([len(word) for word in words]) - 1
    assert once.weights.nonzero()[0].tolist() == ends.tolist()
    assert once.targets[ends].tolist() == [LABELS.index(label) for label in example["labels"]]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_labels_of_a_bundle_are_pytorchs_alone_and_in_a_batch(quantize: str, tmp_path: Path) -> None:
    model = tagger("lstm", "attention", vocab=tokenizer().get_vocab_size(), labels=len(LABELS), context=64)
    device = bundle(tmp_path, model, spec_of("srl"), quantize)
    sentences = [("the cat sat on the mat", "sat"), ("a dog saw", 2), ("the old bird", 0)]
    found = device.task.label_roles_batch(sentences)
    assert [f.labels for f in found] == [device.label_roles(*sentence).labels for sentence in sentences]
    assert len({f.labels for f in found}) > 1
    if quantize == "none":
        expected = in_pytorch(model, device).label_roles_batch(sentences)
        assert [f.labels for f in found] == [e.labels for e in expected]
        assert np.allclose([f.confidence for f in found], [e.confidence for e in expected], atol=1e-5)


def test_a_run_from_examples_to_a_bundle_that_labels_as_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = jsonl(tmp_path / "d.jsonl", ROLES), tmp_path / "run"
    assert call(data, "-o", out, "--task", "srl", *SMALL, "--steps", "30", "--lr", "0.02") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["val_loss"] < 0.2 * told["unigram_entropy"]  # the first label depends on a later word
    loaded = load_checkpoint(out / "best")
    assert loaded.architecture == "tagger" and loaded.task is not None
    assert run(["export", str(out / "best"), "-o", str(tmp_path / "b")]) == 0
    assert run(["verify", str(tmp_path / "b")]) == 0
    model = load(tmp_path / "b", threads=1)
    assert model.tokenizer is not None
    ours = TaskRunner(torch_session(loaded.model), model.tokenizer, loaded.task)
    for example in ROLES[:4]:
        given: Any = example["words"], example["predicate"]
        assert model.label_roles(*given).labels == ours.label_roles(*given).labels == tuple(example["labels"])


def test_what_a_tagger_cannot_be_trained_on_is_told(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the cat saw the birds.\n" * 2000)
    with pytest.raises(TrainingError, match=r"tagger model labels words and goes on with no text.*--task srl"):
        call(text, "-o", tmp_path / "a", *SMALL, "--steps", "2")
    pairs = jsonl(tmp_path / "p.jsonl", PAIRS)
    with pytest.raises(TrainingError, match="tagger model labels words"):
        call(pairs, "-o", tmp_path / "b", "--task", "translation", *SMALL, "--steps", "2")
    roles, other = jsonl(tmp_path / "r.jsonl", ROLES), ("--architecture", "encoder_decoder", *SMALL[2:])
    with pytest.raises(TrainingError, match=r"encoder_decoder model has no num_labels.*use tagger or hybrid"):
        call(roles, "-o", tmp_path / "c", "--task", "srl", *other, "--steps", "2")
