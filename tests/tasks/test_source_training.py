"""Training models that answer sources: what is read and learned where, and a run from examples to a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from source_models import own_model
from task_models import spec_of, tokenizer
from test_tasks_training import PAIRS, call, encode, jsonl

from edgellm.checkpoints import load_checkpoint
from edgellm.cli import run
from edgellm.errors import ConfigError, TrainingError
from edgellm.tasks.encode import Encoded, encode_examples
from edgellm.training.batches import Batch
from edgellm.training.distributed import World
from edgellm.training.example_batches import ExampleBatches
from edgellm.training.forward import Forward
from edgellm.training.loss import batch_loss
from edgellm.training.options import TrainOptions
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime import load
from edgellm_runtime.tasks.runner import TaskRunner

SMALL = (
    "--architecture", "encoder_decoder", "--set", "width=32", "--set", "num_heads=2", "--set", "recurrent_width=24",
    "--set", "mlp_width=48", "--vocab-size", "300", "--batch-tokens", "512", "--context", "64", "--threads", "1",
    "--device", "cpu", "--json",
)  # fmt: skip


def test_the_prompt_is_the_source_and_every_token_of_the_answer_counts() -> None:
    example = {"source": "a cat", "target": "sat"}
    given = spec_of("translation"), encode, tokenizer().token_to_id, 2, [example]
    one = encode_examples(*given, prompt_loss=0.5).rows[0]
    apart = encode_examples(*given, prompt_loss=0.5, start=[7, 9]).rows[0]
    answer = encode("sat")
    assert apart.source.tolist() == one.inputs.tolist()[: len(apart.source)]
    assert [*apart.source, *answer] == one.inputs.tolist()
    assert apart.inputs.tolist() == [7, 9, *answer]
    assert apart.targets.tolist() == [9, *answer, 2]
    assert apart.weights.tolist() == [0.0, *[1.0] * len(answer), 1.0]
    assert len(one.source) == 0 and one.size == len(one.inputs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40), st.integers(60, 200),
)  # fmt: skip
def test_batches_hold_every_row_with_its_own_source_within_the_budget(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    rows = [
        Encoded(np.full(n, i + 1, np.int32), np.ones(n, np.int32), np.ones(n, np.float32), np.full(m, i + 1, np.int32))
        for i, (n, m) in enumerate(sizes)
    ]
    batches = ExampleBatches(rows, rows, vocab_size=99, width=99)
    options = TrainOptions(steps=1, batch_tokens=budget, eval_batches=99)
    seen: list[int] = []
    for batch in batches.validation(options, World(0, 1, torch.device("cpu"))):
        assert batch.sources is not None and batch.source_lengths is not None
        assert batch.tokens <= budget
        for inputs, source, length in zip(batch.inputs, batch.sources, batch.source_lengths, strict=True):
            number = int(inputs[0])
            assert (source[:length] == number).all() and (source[length:] == 0).all()
            assert int(length) == sizes[number - 1][1]
            seen.append(number - 1)
    assert sorted(seen) == list(range(len(sizes)))


@pytest.mark.parametrize("kind", ["attention", "gru"])
def test_the_encoder_learns_and_padding_of_sources_teaches_nothing(kind: str) -> None:
    model = own_model(kind).train()
    source = torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])
    rows, lengths = torch.tensor([[3, 4, 5], [3, 9, 9]]), torch.tensor([3, 5], dtype=torch.int32)
    grads = []
    for filling in (0, 11):
        model.zero_grad()
        filled = source.clone()
        filled[0, 3:] = filling
        batch = Batch(rows, rows, torch.ones(2, 3), filled, lengths)
        batch_loss(Forward(model)(*batch.given), batch).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(float(grad.abs().max()) > 0 for name, grad in grads[0].items() if name.startswith("encoder"))
    assert grads[0].keys() == dict(model.named_parameters()).keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_a_run_from_examples_to_a_bundle_that_answers_as_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = jsonl(tmp_path / "d.jsonl", PAIRS), tmp_path / "run"
    options = (*SMALL, "--set", "encoder=lstm,attention", "--set", "decoder=gru,attention")
    assert call(data, "-o", out, "--task", "translation", *options, "--steps", "25", "--lr", "0.01") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["val_loss"] < told["unigram_entropy"]
    loaded = load_checkpoint(out / "best")
    config: Any = loaded.model.config
    assert config.start_tokens == loaded.eos_token_ids
    assert run(["export", str(out / "best"), "-o", str(tmp_path / "b"), "--target", "cpu", "--quantize", "none"]) == 0
    model = load(tmp_path / "b", threads=1)
    assert loaded.task is not None and model.tokenizer is not None
    ours = TaskRunner(torch_session(loaded.model), model.tokenizer, loaded.task)
    texts = [PAIRS[3]["source"], "the cat", PAIRS[17]["source"]]
    for beams in (1, 3):
        expected, found = (one.translate(texts, beams=beams) for one in (ours, model.task))
        assert [a.tokens for a in found] == [a.tokens for a in expected]
        assert np.allclose([a.confidence for a in found], [a.confidence for a in expected], atol=1e-4)
        assert [a.tokens for a in found] == [model.translate(text, beams=beams).tokens for text in texts]
    assert call(
        data, "-o", tmp_path / "more", "--task", "translation", "--init", out / "best", "--steps", "1",
        "--threads", "1", "--context", "64", "--device", "cpu", "--json",
    ) == 0  # fmt: skip
    again = load_checkpoint(tmp_path / "more" / "best").model.config
    assert again == config


def test_what_such_a_model_cannot_be_trained_on_is_told(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", PAIRS)
    text = tmp_path / "t.txt"
    text.write_text("the cat saw the birds.\n" * 2000)
    with pytest.raises(TrainingError, match="answers sources, and a text has none; train it with --task"):
        call(text, "-o", tmp_path / "a", *SMALL, "--steps", "2")
    with pytest.raises(TrainingError, match=r"context 64 is over the model's 48 tokens"):
        call(data, "-o", tmp_path / "b", "--task", "translation", *SMALL, "--set", "max_source=48", "--steps", "2")
    with pytest.raises(ConfigError, match="encoder has"):
        call(data, "-o", tmp_path / "c", "--task", "translation", *SMALL, "--set", "encoder=tree", "--steps", "2")
