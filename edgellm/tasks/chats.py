"""Chats to train on: lines of messages, as a checkpoint's own template writes them; the assistant's words are learned.

The template and the tokenizer are the device's, so that training reads exactly what generation will.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgellm.errors import TrainingError
from edgellm.tasks.encode import Encoded, EncodedExamples

__all__ = ["Chat", "Template", "encode_chats", "holds_chats", "read_chats", "template_of"]

Chat = Sequence[dict[str, str]]
_WANTED = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_JSONL = (".jsonl", ".ndjson")


class Template(Protocol):
    """What is asked of :class:`edgellm_runtime.text.chat.ChatTemplate`."""

    def encode(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = ...) -> list[int]:
        """Messages as token ids."""
        ...


def template_of(
    source: str, tokenizer_json: str, scratch: Path, *, bos: int | None, ends: tuple[int, ...], vocab_size: int
) -> Template:  # fmt: skip
    """A chat template as the device has it.

    Args:
        source: Jinja.
        tokenizer_json: of the tokenizer that goes with it.
        scratch: a directory for both, for as long as the template is used.
        bos: the token that begins a text, if there is one.
        ends: the tokens that end one.
        vocab_size: how many tokens the model knows.
    """
    from edgellm_runtime.bundle import TokenizerInfo
    from edgellm_runtime.text.chat import ChatTemplate
    from edgellm_runtime.text.tokenizer import Tokenizer

    files = {"tokenizer.json": tokenizer_json, "chat_template.jinja": source}
    for name, text in files.items():
        (scratch / name).write_text(text, encoding="utf-8", newline="")
    info = TokenizerInfo(bos, ends, has_chat_template=True)
    return ChatTemplate(
        scratch / "chat_template.jinja", Tokenizer(scratch / "tokenizer.json", info, vocab_size=vocab_size)
    )


def holds_chats(paths: Iterable[Path]) -> bool:
    """Whether the first line of the first of these files that is JSON Lines holds messages."""
    for path in paths:
        if path.suffix in _JSONL and path.is_file():
            with path.open("rb") as file:
                line = next((line for line in file if line.strip()), b"")
            try:
                return "messages" in json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError, TypeError):
                return False
    return False


def read_chats(path: Path) -> list[Chat]:
    """The chats of a file, one a line.

    Raises:
        TrainingError: it cannot be read, holds none, or a line is none; names the place.
    """
    found: list[Chat] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found.append(_checked(line, f"{path}:{number}"))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); name a .jsonl file") from None
    if not found:
        raise TrainingError(f"{path} holds no chat; a line is {_WANTED}")
    return found


def _checked(line: bytes, place: str) -> Chat:
    try:
        data: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TrainingError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{place}: not JSON ({error}); a line is {_WANTED}") from None
    messages = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(messages, list) or not messages:
        raise TrainingError(f"{place}: has no list of messages; a line is {_WANTED}")
    for index, message in enumerate(messages):
        texts = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not texts or set(message) != {"role", "content"}:
            raise TrainingError(f"{place}: message {index} is not a role and a content in words; a line is {_WANTED}")
    if not any(message["role"] == "assistant" for message in messages):
        raise TrainingError(f"{place}: nobody speaks as the assistant, so there is nothing to learn; add its answer")
    return messages


def encode_chats(
    template: Template, chats: Iterable[Chat], *, context: int, prompt_loss: float = 0.0
) -> EncodedExamples:
    """Encode chats for training.

    A turn of the assistant's is learned as it stands in the whole chat. Where the template writes earlier turns
    otherwise than it wrote them when they were the last (some leave out what was thought), each turn is an example of
    its own.

    Args:
        template: of the checkpoint.
        chats: to learn from.
        context: the most tokens of an example; what is longer is left out.
        prompt_loss: how much the other tokens count beside the assistant's.
    """
    rows: list[Encoded] = []
    dropped = 0
    for chat in chats:
        spans = [_turn(template, chat, i) for i, message in enumerate(chat) if message["role"] == "assistant"]
        whole = spans[-1][0]
        if all(tokens == whole[: len(tokens)] for tokens, _ in spans):
            examples = [(whole, [(start, len(tokens)) for tokens, start in spans])]
        else:
            examples = [(tokens, [(start, len(tokens))]) for tokens, start in spans]
        for tokens, learned in examples:
            if len(tokens) > context + 1:
                dropped += 1
            else:
                rows.append(_encoded(tokens, learned, prompt_loss))
    return EncodedExamples(rows, 0, dropped)


def _turn(template: Template, chat: Chat, index: int) -> tuple[list[int], int]:
    """The chat up to a turn of the assistant's as tokens, and where its words begin.

    What follows the assistant's last word up to the end of its turn is learned too: it is how a turn ends.
    """
    tokens = template.encode(chat[: index + 1], add_generation_prompt=False)
    opening = template.encode(chat[:index], add_generation_prompt=True) if index else []
    start = next((i for i, (a, b) in enumerate(zip(opening, tokens, strict=False)) if a != b), len(opening))
    return tokens, min(start, len(tokens))


def _encoded(tokens: Sequence[int], learned: Sequence[tuple[int, int]], prompt_loss: float) -> Encoded:
    ids = np.array(tokens, dtype=np.int32)
    weights = np.full(len(ids) - 1, prompt_loss, dtype=np.float32)
    for start, end in learned:
        weights[max(start, 1) - 1 : end - 1] = 1.0
    return Encoded(ids[:-1], ids[1:], weights)
