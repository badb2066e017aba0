"""Whether a bundle's text will do what a loader asks of it: asked before any work, of the loader's own code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgellm_exporters.errors import ExportError
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.errors import BundleError, OptionError
from edgellm_runtime.task_spec import TaskSpec
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.messages import Message
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["TEMPLATE", "TOKENIZER", "check_text"]

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
_NAMED = 3  # tokens that an error names
_USER: Message = {"role": "user", "content": "Hello"}
_CHATS = ([_USER], [{"role": "system", "content": "Answer briefly."}, _USER])  # some templates want the second


def check_text(directory: Path, info: TokenizerInfo, task: TaskSpec | None, vocab_size: int) -> None:
    """Read a tokenizer and a chat template as a loader will.

    Args:
        directory: where the files are, under the names that bundles have for them.
        info: what the manifest will say of them.
        task: likewise.
        vocab_size: how many tokens the model has.

    Raises:
        ExportError: a begin or end token outside the vocabulary, a tokenizer that is none or is larger than the model
            or lacks a token of the task's prompts, or a template that does not compile or renders no plain question.
    """
    for name, token in _named(info):
        if not 0 <= token < vocab_size:
            raise ExportError(
                f"the {name} token {token} is outside the model's vocabulary of {vocab_size}; correct {name}_token_id "
                "in the checkpoint"
            )
    try:
        tokenizer = Tokenizer(directory / TOKENIZER, info, vocab_size=vocab_size)
    except BundleError as error:
        raise ExportError(f"the checkpoint's tokenizer cannot be used: {_reason(error)}") from error
    if surplus := sorted((i, word) for word, i in _vocabulary(directory).items() if i >= vocab_size):
        names = ", ".join(f"{word!r} ({i})" for i, word in surplus[:_NAMED])
        raise ExportError(
            f"the tokenizer has {len(surplus)} tokens that the model, of {vocab_size}, has no row for, such as "
            f"{names}; give the model its own tokenizer, or take these out of tokenizer.json"
        )
    words = [segment.value for segment in task.prompt if segment.kind == "token"] if task is not None else []
    if missing := [word for word in words if tokenizer.token_id(word) is None]:
        raise ExportError(f"the tokenizer lacks {missing}, which prompts of the task need; train the model again")
    if info.has_chat_template:
        _check_template(ChatTemplate(directory / TEMPLATE, tokenizer))


def _named(info: TokenizerInfo) -> Iterator[tuple[str, int]]:
    if info.bos_token_id is not None:
        yield "bos", info.bos_token_id
    for token in info.eos_token_ids:
        yield "eos", token


def _vocabulary(directory: Path) -> dict[str, int]:
    from tokenizers import Tokenizer as Library

    found: dict[str, int] = Library.from_file(str(directory / TOKENIZER)).get_vocab(with_added_tokens=True)
    return found


def _check_template(template: ChatTemplate) -> None:
    refusal: OptionError | None = None
    for messages in _CHATS:
        try:
            if template.encode(messages):
                return
        except OptionError as error:  # the template's own raise_exception
            refusal = refusal or error
        except BundleError as error:
            raise ExportError(f"the checkpoint's chat template cannot be used: {_reason(error)}") from error
    said = f"refuses a plain question ({refusal})" if refusal else "makes an empty prompt of a plain question"
    raise ExportError(f"the checkpoint's chat template {said}; correct it, or take it out of the checkpoint")


def _reason(error: BundleError) -> str:
    """What a loader says, without the path of a folder that nobody knows and advice for people who load."""
    return str(error).split(": ", 1)[-1].replace(" and export the model again", "").removesuffix(
        "; export the model again"
    )  # fmt: skip
