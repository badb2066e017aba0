"""docs/embedding.md: every block of Python runs, in order; what it says of threads is so."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tiny_bundles import attention_bundle, copied, hidden_bundle, recurrent_bundle

import edgellm_runtime
from edgellm_runtime import errors, load
from edgellm_runtime.generation.generate import GenerationOptions

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copied(hidden_bundle(), tmp_path)
    monkeypatch.chdir(tmp_path)
    page = ModuleType("embedding_page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, page.__name__, page)
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    assert len(blocks) > 10
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), page.__dict__)
    said = capsys.readouterr().out
    assert "temperature is -1" in said
    assert "choose with torch.where" in said


def test_table_of_errors_is_complete() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+Error)` \|", text, re.M))
    assert named == {n for n in errors.__all__ if n.endswith("Error")}
    assert named < set(edgellm_runtime.__all__)


def test_table_of_options_is_complete() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| option |") : text.index("### Stream")]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.M))
    assert rows.keys() == {f.name for f in fields(GenerationOptions)}
    for f in fields(GenerationOptions):
        assert rows[f.name] == ("none" if f.default in ((), None) else str(f.default))


@pytest.mark.parametrize("make", [attention_bundle, recurrent_bundle])
def test_one_model_in_many_threads_answers_as_in_one(make: Any) -> None:
    model = load(make(), threads=1)
    generator = np.random.default_rng(4)
    prompts = [generator.integers(0, model.session.vocab_size, n).tolist() for n in range(1, 25)]

    def answer(prompt: list[int]) -> tuple[int, ...]:
        return model.generate(prompt, max_new_tokens=20, temperature=1.0, seed=9, ignore_eos=True).tokens

    expected = [answer(p) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(answer, prompts)) == expected


def test_one_tokenizer_and_template_in_many_threads(tmp_path: Path) -> None:
    model = load(attention_bundle(), threads=1)
    texts = [f"hello <|im_end|> {i}" for i in range(40)]

    def encode(text: str) -> tuple[list[int], list[int], list[int]]:
        assert model.tokenizer is not None
        plain, special = model.tokenizer.encode(text), model.tokenizer.encode(text, special=True)
        return plain, special, model.chat_template.encode([{"role": "user", "content": text}])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encode, texts))
    assert found == [encode(t) for t in texts]
    assert all(plain != special for plain, special, _ in found)
