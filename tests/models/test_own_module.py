"""The example of a model from outside: it trains, exports to every target, and computes what PyTorch computes."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import cpu_targets
from training_models import TEXT, data, options

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm.training import train
from edgellm_exporters.export import Exported, ExportOptions, TextAssets, export
from edgellm_exporters.graph import capture_encoder
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.methods import METHODS
from edgellm_runtime import load, open_session

FOLDER = Path(__file__).parents[2] / "examples" / "own_module"


@cache
def own() -> Any:
    """The example's module, under a name that nothing else has."""
    sys.path.insert(0, str(FOLDER))
    try:
        import model

        return model
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True, scope="module")
def _traced_once() -> Iterator[None]:
    """Tracing takes seconds and does not depend on the target: each model's graph is kept."""
    kept: dict[int, tuple[Any, ir.Model]] = {}

    def capture_once(model: Any, *_: Any, **__: Any) -> ir.Model:
        if id(model) not in kept:
            kept[id(model)] = model, capture(model)
        return kept[id(model)][1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_encoder, "capture", capture_once)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextAssets]:
    folder = tmp_path_factory.mktemp("own")
    tokens, tokenizer = data(folder)
    torch.manual_seed(0)
    model = own().RetentionModel(
        own().RetentionConfig(tokens.vocab_size, max_context=64, width=64, num_heads=2, num_layers=2)
    )
    result = train(
        model, tokens, options(steps=30, context=32, eval_every=30, save_every=30), folder / "run", architecture="own",
        tokenizer=tokenizer,
    )  # fmt: skip
    assert result.val_loss < result.unigram_entropy
    return model.eval(), TextAssets(tokenizer_json=tokenizer.to_str(), eos_token_ids=(0,))


def random_tokens(model: Any, *shape: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_it_follows_the_protocol_and_nothing_in_edgellm_knows_it(trained: Any) -> None:
    assert isinstance(trained[0], LanguageModel)
    assert type(trained[0]).__module__ == "model"
    updates = {spec.update for spec in trained[0].state_specs()}
    assert updates == {"append", "replace"}


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[*range(1, 24)], [1, 2, 13], [23]])
def test_pytorch_in_pieces_equals_the_whole(trained: Any, cuts: list[int]) -> None:
    model, _ = trained
    tokens = random_tokens(model, 3, 24)
    whole, _ = model(tokens)
    state, parts = empty_state(model, 3, 24), []
    for start, end in zip([0, *cuts], [*cuts, 24], strict=True):
        piece = tokens[:, start:end]
        step = Step.whole(piece)
        logits, state = model(piece, state, step._replace(past_lengths=step.past_lengths + start))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pytorch_rows_of_a_ragged_batch_equal_each_row_alone(trained: Any) -> None:
    model, _ = trained
    tokens, lengths = random_tokens(model, 3, 12), [12, 5, 1]
    step = Step.whole(tokens)._replace(lengths=torch.tensor(lengths, dtype=torch.int32))
    logits, state = model(tokens, empty_state(model, 3, 16), step)
    for row, n in enumerate(lengths):
        alone = tokens[row : row + 1, :n]
        expected, after = model(alone, empty_state(model, 1, 16), Step.whole(alone))
        torch.testing.assert_close(logits[row, :n], expected[0], rtol=1e-4, atol=1e-4)
        for spec in model.state_specs():
            if spec.update == "replace":
                torch.testing.assert_close(state[spec.name][row], after[spec.name][0], rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_over_a_long_window(trained: Any) -> None:
    model = own().RetentionModel(trained[0].config)
    torch.nn.init.constant_(model.blocks[0].mixer.decay.bias, -20.0)  # forgets all but at once
    model(random_tokens(model, 2, 64))[0].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.fixture(scope="module", params=[(t, q) for t in cpu_targets() for q in ("none", "int8")], ids="-".join)
def exported(request: pytest.FixtureRequest, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    target, quantize = request.param
    model, text = trained
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return export(model, folder, options=ExportOptions(target=target, quantize=quantize), text=text)


def test_bundle_equals_pytorch(trained: Any, exported: Exported) -> None:
    bounds = METHODS[exported.bundle.manifest.quantization["method"]].bounds
    session = open_session(exported.bundle, threads=1)
    windows = [random_tokens(trained[0], n).tolist() for n in (64, 17, 2)]
    report = compare(trained[0], session, windows, greedy_prompts=[windows[1]])
    assert not [c for c in report.checks(dict(bounds)) if not c.ok]
    assert exported.verification.ok


def test_bundle_in_pieces_and_ragged_equals_the_whole(trained: Any, exported: Exported) -> None:
    session = open_session(exported.bundle, threads=1)
    rows = random_tokens(trained[0], 3, 20).numpy()
    whole = [session.step(row[None], session.new_state(), logits="all")[0].copy() for row in rows]
    scale = max(float(np.abs(w).max()) for w in whole)
    quantized = exported.bundle.manifest.quantization["method"] != "none"
    close = {"rtol": 0, "atol": scale * (0.1 if quantized else 1e-4)}
    state = session.new_state(3)
    lengths = np.array([9, 4, 1])
    first = session.step(rows[:, :9], state, lengths=lengths).copy()
    second_lengths = np.array([3, 11, 2])
    second_rows = np.stack(
        [np.pad(r[n : n + 11], (0, 11 - len(r[n : n + 11]))) for r, n in zip(rows, lengths, strict=True)]
    )
    second = session.step(second_rows, state, lengths=second_lengths).copy()
    for row in range(3):
        np.testing.assert_allclose(first[row, 0], whole[row][lengths[row] - 1], **close)
        np.testing.assert_allclose(second[row, 0], whole[row][lengths[row] + second_lengths[row] - 1], **close)
    answer = load(exported.bundle.path, threads=1).generate("10 green", max_new_tokens=5)
    assert len(answer.tokens) == 5 or answer.finish_reason == "eos"


def test_readme_shows_the_code_that_runs() -> None:
    readme, model = (FOLDER / "README.md").read_text(), (FOLDER / "model.py").read_text()
    main = (FOLDER / "main.py").read_text()
    blocks = [b.split("```")[0] for b in readme.split("```python\n")[1:]]
    assert blocks
    for line in (line.strip() for block in blocks for line in block.splitlines()):
        assert line in model or line in main, line


@pytest.mark.slow
def test_main_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(own().RetentionConfig, width=32, num_heads=1, num_layers=2)
    monkeypatch.setattr(own(), "RetentionConfig", small)
    (tmp_path / "text.txt").write_text(TEXT * 2)
    sys_argv = ["main.py", "--text", str(tmp_path / "text.txt"), "--steps", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", sys_argv)
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        runpy.run_path(str(FOLDER / "main.py"), run_name="__main__")
    finally:
        torch.set_num_threads(1)
    said = capsys.readouterr().out
    assert said.count("every file is the one that was exported") == 3
