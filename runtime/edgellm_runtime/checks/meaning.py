"""What a bundle's tokens, texts and limits mean, as a record that two looks at it can be compared by.

The numbers of a graph are nothing without it: an end token of another id, a template with another role's opening, a
context that is longer than the rotation's table. An export writes the record into the goldens, and ``verify`` makes it
anew from what the loader would use.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from edgellm_runtime.bundle import Bundle, Manifest
from edgellm_runtime.bundle.limits import only_once
from edgellm_runtime.errors import BundleError, RuntimeFault, first_line
from edgellm_runtime.json_text import json_text
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.messages import Message
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["MEANING", "differences", "meaning_of"]

MEANING = "meaning"
_TEXTS = (
    "The lighthouse keeper wrote a letter every evening, though the boat came only twice a month.",
    "  naïve café: 東京 🦊 ꙮ \u0b95 \x01\n\tdef f(x): return x**2  # 1,234.5\r\n",  # what few vocabularies have whole
    "",
)
_SPECIALS = 16  # names of special tokens that are read in one text
_NOON = datetime.datetime(2024, 2, 29, 12, 0, tzinfo=datetime.UTC)  # what a template takes for now
_CHATS: Mapping[str, list[Message]] = {
    "question": [{"role": "user", "content": "Where is the keeper's boat?"}],
    "conversation": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good evening."},
        {"role": "user", "content": "Where is the keeper's boat?"},
    ],
}


def meaning_of(bundle: Bundle) -> dict[str, Any]:
    """The record, plain JSON by name.

    Args:
        bundle: whose manifest, tokenizer and template are looked at.

    Raises:
        BundleError: its tokenizer or its template is broken.
    """
    found = _of_manifest(bundle.manifest)
    info = bundle.manifest.tokenizer
    if info is None:
        return found
    file = bundle.file("tokenizer.json")
    data = bundle.read("tokenizer.json")
    tokenizer = Tokenizer(file, info, vocab_size=bundle.manifest.vocab_size or bundle.manifest.width, data=data)
    found |= _of_tokenizer(tokenizer) | {"tokenizer.json": _digest(_parsed(bundle, data))}
    if info.has_chat_template:
        source = bundle.read("chat_template.jinja")
        template = ChatTemplate(bundle.file("chat_template.jinja"), tokenizer, source, _NOON)
        found |= {f"template: {name}": _rendered(template, chat) for name, chat in _CHATS.items()}
        found["chat_template.jinja"] = hashlib.sha256(source).hexdigest()
    return found


def differences(expected: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """The names of what is otherwise than a record has it; one sentence where the bundle cannot be looked at."""
    try:
        found = json.loads(json_text(meaning_of(bundle)))
    except RuntimeFault as error:
        return [first_line(error)]
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    said = manifest.to_json()
    names = (
        "max_context", "ragged_chunks", "vocab_size", "dtype", "target", "tokenizer", "task", "generation", "bounds",
        "capacity",
    )  # fmt: skip
    return {name: said.get(name) for name in names} | {"state": said["signature"]["state"]}


def _of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    named = {str(i): tokenizer.token_text(i) for i in sorted(tokenizer.special_ids)}
    ends = {i for i in (tokenizer.bos_token_id, *tokenizer.eos_token_ids) if i is not None}
    texts = {f"text {number}": text for number, text in enumerate(_TEXTS)}
    texts["special names"] = " ".join(str(text) for text in list(named.values())[:_SPECIALS])
    found: dict[str, Any] = {
        "special tokens": named,
        "first and end tokens": {str(i): tokenizer.token_text(i) for i in sorted(ends)},
        "named tokens": {name: tokenizer.token_id(text) for name, text in tokenizer.special_tokens.items()},
    }
    for name, text in texts.items():
        ids = tokenizer.encode(text, bos=tokenizer.add_bos)
        found[name] = {
            "ids": ids, "decoded": tokenizer.decode(ids), "special": tokenizer.encode(text, special=True),
        }  # fmt: skip
    return found


def _rendered(template: ChatTemplate, chat: list[Message]) -> dict[str, Any] | str:
    try:
        return {"text": template.render(chat), "ids": template.encode(chat)}
    except RuntimeFault as error:  # some templates want no system turn, and say so
        if isinstance(error, BundleError):
            raise
        return first_line(error)


def _parsed(bundle: Bundle, data: bytes) -> Any:
    try:
        return json.loads(data, object_pairs_hook=only_once)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{bundle.path}: tokenizer.json has more than one reading ({first_line(error)}); export the model again"
        ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
