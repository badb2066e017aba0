"""Messages to a prompt, through the bundle's Jinja template. The template and the messages are untrusted.

The template is rendered in Jinja's immutable sandbox: no attributes of Python's, no files, no imports. What it may
spend is bounded in :mod:`edgellm_runtime.text.template_limits`.

The special tokens that the template writes are special; those that a message merely names are not. Before rendering,
each such name in a message is replaced by one private-use character that occurs nowhere else, so that the template can
still trim, split and join; afterwards the text between the template's own special tokens gets its names back and is
encoded as plain characters. Messages without such names take no detour: their prompt is the rendered text, encoded.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgellm_runtime.arguments import check_flag, is_sequence, shown
from edgellm_runtime.errors import BundleError, OptionError, first_line
from edgellm_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ROLES", "ChatTemplate", "Message", "check_messages"]

Message = Mapping[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_SOURCE = 256 * 1024  # bytes; the longest template in the field is a tenth of it
_MAX_OVERHEAD = 1024 * 1024  # characters that a template may add to its messages
_PRIVATE = range(0xF0000, 0xFFFFE)  # plane 15: no font, tokenizer or normaliser gives these a meaning


class _Refusal(Exception):
    """The template called raise_exception."""


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as plain dicts of ``role`` and ``content``.

    Raises:
        OptionError: none at all, an unknown role, or a content that is no text.
    """
    if not is_sequence(messages) or not len(messages):
        raise OptionError(f"messages is {shown(messages)}; pass a list of at least one {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise OptionError(f"message {i} is {shown(message)}; it must have exactly the keys 'role' and 'content'")
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise OptionError(f"message {i} has role {shown(message['role'])}; use one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise OptionError(f"message {i} has content {shown(message['content'])}; it must be a text")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


class ChatTemplate:
    """A bundle's chat template.

    Args:
        path: ``chat_template.jinja``.
        tokenizer: whose special tokens the template writes.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path = path
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text, for reading; :meth:`encode` is what a model should get.

        Args:
            messages: the conversation so far.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            OptionError: messages that are malformed or that the template refuses.
            BundleError: the template is broken, or writes without end.
        """
        from edgellm_runtime.text.template_limits import rendering

        checked = check_messages(messages)
        check_flag("add_generation_prompt", add_generation_prompt)
        given_size = sum(len(m["content"]) for m in checked)
        limit = _MAX_OVERHEAD + 4 * given_size
        # templates test for tools and documents, and the field's renderers pass None
        given = {"messages": checked, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        parts: list[str] = []
        size = 0
        try:
            template = self._template
            with rendering(given_size):
                for part in template.generate(**given, **self._tokens):
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise self._broken(f"it writes more than {limit} characters")
        except _Refusal as e:
            raise OptionError(
                f"the chat template refuses these messages: {first_line(e)}; change them accordingly"
            ) from e
        except (KeyboardInterrupt, SystemExit, BundleError):
            raise
        except Exception as e:  # a template can raise anything that Python can
            raise self._broken(first_line(e)) from e
        return "".join(parts)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The prompt as token ids; only the template's own special tokens are special.

        Args:
            messages: the conversation so far.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            OptionError: messages that are malformed or that the template refuses.
            BundleError: the template or the tokenizer is broken.
        """
        checked = check_messages(messages)
        masked, names = self._mask(checked)
        text = self.render(masked, add_generation_prompt=add_generation_prompt)
        if not names:
            return self._tokenizer.encode(text, special=True)
        ids: list[int] = []
        at = 0
        unmask = str.maketrans(names)
        for start, end, token in [*self._tokenizer.special_spans(text), (len(text), len(text), -1)]:
            ids += self._tokenizer.encode(text[at:start].translate(unmask)) if at < start else []
            ids += [token] if token >= 0 else []
            at = end
        return ids

    def _mask(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages with private-use characters for the names of special tokens, and what each stands for."""
        used = set(itertools.chain(self._source, *(m["content"] for m in messages)))
        free = (chr(c) for c in _PRIVATE if chr(c) not in used)
        marks: dict[str, str] = {}
        masked = []
        for message in messages:
            content = message["content"]
            while spans := self._tokenizer.special_spans(content):  # again, for one name may have hidden another
                at, parts = 0, list[str]()
                for start, end, _ in spans:
                    # a token's span may take in the space around it, which the template is free to trim
                    name = content[start:end].strip() or content[start:end]
                    start = content.index(name, start)
                    if name not in marks:
                        marks[name] = next(free)
                    parts += [content[at:start], marks[name]]
                    at = start + len(name)
                content = "".join(parts) + content[at:]
            masked.append({**message, "content": content})
        return masked, {mark: name for name, mark in marks.items()}

    @cached_property
    def _source(self) -> str:
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_SOURCE + 1)
            if len(data) > _MAX_SOURCE:
                raise self._broken(f"it is longer than {_MAX_SOURCE} bytes")
            return data.decode()
        except (OSError, UnicodeDecodeError) as e:
            raise self._broken(first_line(e)) from e

    @cached_property
    def _tokens(self) -> dict[str, str]:
        named = {"bos_token": self._tokenizer.bos_token_id, "eos_token": self._tokenizer.eos_token_id}
        texts = {name: self._tokenizer.token_text(token) for name, token in named.items()}
        return {name: text for name, text in texts.items() if text is not None}

    @cached_property
    def _template(self) -> Template:
        from edgellm_runtime.text.template_limits import rendering

        try:
            with rendering():  # constants are computed when it is compiled
                template: Template = _environment().from_string(self._source)
        except (KeyboardInterrupt, SystemExit, BundleError):
            raise
        except Exception as e:  # besides syntax errors, the parser runs into Python's own limits
            raise self._broken(first_line(e)) from e
        return template

    def _broken(self, why: str) -> BundleError:
        return BundleError(f"{self._path}: the chat template failed ({why}); correct it and export the model again")


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    from edgellm_runtime.text.template_limits import LimitedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it on the instance

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.limit_filters()
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)
