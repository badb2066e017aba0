"""SmolLM2-135M as a float32 bundle against transformers' float32 model, on real text and in greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import cpu_targets
from real_model import transformers_model

from edgellm.checkpoints import Checkpoint
from edgellm_exporters.export import Exported, ExportOptions, TextAssets, export
from edgellm_runtime import load

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]  # the warnings here are transformers' own

TEXT = Path(__file__).parents[2] / "examples/data/tinyshakespeare.txt"
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what a recurrent neural network is, in two sentences.",
    "List three uses of a paper clip.",
    "Translate 'good morning' into Spanish, German and Italian.",
)


@pytest.fixture(scope="module")
def reference(gguf_path: Path, transformers):
    torch.set_num_threads(2)
    return transformers_model(gguf_path, transformers)


@pytest.fixture(scope="module", params=cpu_targets())
def exported(request: pytest.FixtureRequest, ours: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    text = TextAssets(
        tokenizer_json=ours.tokenizer_json or "", chat_template=ours.chat_template, bos_token_id=ours.bos_token_id,
        eos_token_ids=ours.eos_token_ids,
    )  # fmt: skip
    options = ExportOptions(target=request.param)
    return export(ours.model, tmp_path_factory.mktemp("real") / "bundle", options=options, text=text)


@torch.no_grad()
def test_distribution_equals_transformers_on_1024_tokens(exported: Exported, reference) -> None:
    model = load(exported.bundle.path)
    tokens = np.array([model.tokenizer.encode(TEXT.read_text()[:8000])[:1024]])
    state = model.session.new_state(1, 1024)
    ours = torch.from_numpy(model.session.step(tokens, state, logits="all")[0]).double()
    theirs = reference(torch.from_numpy(tokens)).logits[0].double()
    assert ours.shape == theirs.shape == (1024, 49152)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    print(f"{exported.bundle.manifest.target['name']}: mean KL {kl:.2e} nats over 1,024 tokens")
    assert kl < 1e-6
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@torch.no_grad()
def test_greedy_tokens_equal_transformers(exported: Exported, reference) -> None:
    model = load(exported.bundle.path)
    for prompt in PROMPTS:
        tokens = model.chat_template.encode([{"role": "user", "content": prompt}])
        ours = model.generate(tokens, max_new_tokens=128, ignore_eos=True).tokens
        row = torch.tensor([tokens])
        theirs = reference.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=128, min_new_tokens=128, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(tokens) :].tolist()  # fmt: skip
        assert list(ours) == theirs, prompt


def test_what_the_readme_says_of_frances_capital_is_true(ours: Checkpoint, tmp_path: Path) -> None:
    text = TextAssets(
        tokenizer_json=ours.tokenizer_json or "", chat_template=ours.chat_template, bos_token_id=ours.bos_token_id,
        eos_token_ids=ours.eos_token_ids,
    )  # fmt: skip
    began = {}
    for method in ("none", "int8", "keep"):
        export(ours.model, tmp_path / method, options=ExportOptions(quantize=method), text=text)
        model = load(tmp_path / method)
        tokens = model.chat_template.encode([{"role": "user", "content": PROMPTS[0]}])
        began[method] = model.generate(tokens, max_new_tokens=24).text
        if method == "none":
            logits = model.session.step(np.array([tokens]), model.session.new_state(1), logits="last").reshape(-1)
            shares = np.exp(logits.astype(np.float64) - logits.max())
            shares /= shares.sum()
            first, second = (shares[model.tokenizer.encode(word)[0]] for word in ("The", "L"))
            assert (round(float(first), 3), round(float(second), 3)) == (0.152, 0.140)
    assert began["none"] == "The capital of France is Paris."
    assert began["int8"].startswith("L'") and began["keep"].startswith("L'")
