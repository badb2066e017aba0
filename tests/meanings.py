"""Changes of what a bundle's tokens, texts and limits mean, checksums rewritten; its graph stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_files import sign

TOKENIZER, TEMPLATE, MANIFEST = "tokenizer.json", "chat_template.jinja", "manifest.json"
Meaning = Callable[[Path], None]


def _in_json(name: str, change: Callable[[dict[str, Any]], None]) -> Meaning:
    def apply(bundle: Path) -> None:
        data = json.loads((bundle / name).read_text())
        change(data)
        (bundle / name).write_text(json.dumps(data))
        if name != MANIFEST:
            sign(bundle, name)

    return apply


def manifest(change: Callable[[dict[str, Any]], None]) -> Meaning:
    return _in_json(MANIFEST, change)


def tokenizer(change: Callable[[dict[str, Any]], None]) -> Meaning:
    return _in_json(TOKENIZER, change)


def template(old: str, new: str) -> Meaning:
    def apply(bundle: Path) -> None:
        text = (bundle / TEMPLATE).read_text()
        assert old in text
        (bundle / TEMPLATE).write_text(text.replace(old, new, 1))
        sign(bundle, TEMPLATE)

    return apply


def twice(name: str, key: str, value: str) -> Meaning:
    """The key again, at the end of the file's object, which most readers take."""

    def apply(bundle: Path) -> None:
        text = (bundle / name).read_text().rstrip()
        assert text.endswith("}")
        (bundle / name).write_text(f'{text[:-1]}, "{key}": {value}}}')
        if name != MANIFEST:
            sign(bundle, name)

    return apply


def _swap(vocabulary: dict[str, int]) -> None:
    """Two words of the middle change places."""
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[len(vocabulary) // 2 :][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _special(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(token for token in data["added_tokens"] if token["special"])
    return found


def _of(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def found(data: dict[str, Any]) -> dict[str, Any]:
        inner: dict[str, Any] = data[kind]
        return inner

    return found


_tokens = _of("tokenizer")
MEANINGS: Mapping[str, Meaning] = {
    "another end token": manifest(lambda m: _tokens(m).update(eos_token_ids=[5])),
    "end tokens in another order": manifest(lambda m: _tokens(m)["eos_token_ids"].reverse()),
    "one end token fewer": manifest(lambda m: _tokens(m)["eos_token_ids"].pop()),
    "no end token": manifest(lambda m: _tokens(m).update(eos_token_ids=[])),
    "a first token": manifest(lambda m: _tokens(m).update(bos_token_id=1)),
    "a first token before each text": manifest(lambda m: _tokens(m).update(bos_token_id=1, add_bos=True)),
    "no template": manifest(lambda m: _tokens(m).update(has_chat_template=False)),
    "another name of a special token": manifest(lambda m: _tokens(m).update(special_tokens={"pad_token": "<|x|>"})),
    "a longer context": manifest(lambda m: m.update(max_context=m["max_context"] + 1)),
    "a shorter context": manifest(lambda m: m.update(max_context=m["max_context"] // 2)),
    "ragged chunks": manifest(lambda m: m.update(ragged_chunks=not m["ragged_chunks"])),
    "a smaller vocabulary": manifest(lambda m: m.update(vocab_size=m["vocab_size"] - 1)),
    "another target": manifest(lambda m: m["target"].update(name="onnx")),
    "a target that there is not": manifest(lambda m: m["target"].update(name="abacus")),
    "another dtype": manifest(lambda m: m.update(dtype="float16")),
    "a looser bound": manifest(lambda m: m["bounds"].update(kl=2.0)),
    "a bound fewer": manifest(lambda m: m["bounds"].pop("split")),
    "no bound on the meaning": manifest(lambda m: m["bounds"].pop("meaning")),
    "a task": manifest(lambda m: m.update(task={"name": "generation", "max_new_tokens": 3})),
    "a sampling default": manifest(lambda m: m.update(generation={"temperature": 1.5})),
    "the context twice": twice(MANIFEST, "max_context", "7"),
    "words swapped": tokenizer(lambda t: _swap(t["model"]["vocab"])),
    "a merge fewer": tokenizer(lambda t: t["model"]["merges"].pop()),
    "merges in another order": tokenizer(lambda t: t["model"]["merges"].reverse()),
    "a special token is plain": tokenizer(lambda t: _special(t).update(special=False)),
    "a special token takes the space before it": tokenizer(lambda t: _special(t).update(lstrip=True)),
    "small letters": tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})),
    "texts are cut": tokenizer(
        lambda t: t.update(
            truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        )
    ),
    "another decoder": tokenizer(lambda t: t.update(decoder={"type": "Fuse"})),
    "the model twice": twice(TOKENIZER, "normalizer", "null"),
    "another role": template("m['role']", "'tool'"),
    "no opening of the answer": template("add_generation_prompt", "false"),
    "a word more": template("{", "Sure! {"),
}  # fmt: skip
