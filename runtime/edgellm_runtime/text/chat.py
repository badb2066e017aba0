"""Messages to a prompt, through the bundle's Jinja template. The template and the messages are untrusted.

The template is rendered in Jinja's immutable sandbox: no attributes of Python's, no files, no imports. What it may
spend is bounded in :mod:`edgellm_runtime.text.template_limits`.

The special tokens that the template writes are special; those that a message merely names are not. To tell them apart,
the template is rendered again with one private-use character, which occurs nowhere else, for each such name. Where the
names can be put back and give the very text of :meth:`ChatTemplate.render`, the text between the template's own special
tokens is encoded as plain characters. Messages without such names take no detour: their prompt is the rendered text,
encoded. Either way the prompt is the text that ``render`` gives, or the message is refused.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_runtime.arguments import check_flag
from edgellm_runtime.errors import BundleError, OptionError, first_line
from edgellm_runtime.text.messages import Message, check_inputs, check_messages, texts_of
from edgellm_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ChatTemplate", "Objects"]

_MAX_SOURCE = 256 * 1024  # bytes; the longest template in the field is a tenth of it
_MAX_OVERHEAD = 1024 * 1024  # characters that a template may add to its messages
_PRIVATE = range(0xF0000, 0xFFFFE)  # plane 15: no font, tokenizer or normaliser gives these a meaning
Objects = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A bundle's chat template. It renders what Hugging Face's ``apply_chat_template`` does, character by character.

    Args:
        path: ``chat_template.jinja``.
        tokenizer: whose special tokens the template writes.
        data: what the file holds, where it has been read already.
        now: what the template takes for now; None for the clock's.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer, data: bytes | None = None, now: datetime.datetime | None = None
    ) -> None:
        self._path, self._data, self._now = path, data, now
        self._tokenizer = tokenizer

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Objects | None = None,
        documents: Objects | None = None, template_variables: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt as text, for reading; :meth:`encode` is what a model should get.

        Args:
            messages: the conversation so far; see :func:`~edgellm_runtime.text.messages.check_messages`.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions that the model may call.
            documents: what it may look at, ``{"title": ..., "text": ...}`` each.
            template_variables: the template's own, such as ``{"enable_thinking": False}``.

        Raises:
            OptionError: arguments that are malformed or that the template refuses.
            BundleError: the template is broken, or spends more than it may.
        """
        from edgellm_runtime.text.template_language import clock

        given = self._given(messages, add_generation_prompt, tools, documents, template_variables)
        return self._rendered(given, clock(self._now))

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Objects | None = None,
        documents: Objects | None = None, template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """The prompt as token ids; only the template's own special tokens are special.

        Args:
            messages: as for :meth:`render`.
            add_generation_prompt: likewise.
            tools: likewise.
            documents: likewise.
            template_variables: likewise.

        Raises:
            OptionError: as for :meth:`render`; or a special token that a message names cannot be told from the
                template's own.
            BundleError: the template or the tokenizer is broken.
        """
        from edgellm_runtime.text.template_language import clock

        given, now = (
            self._given(messages, add_generation_prompt, tools, documents, template_variables),
            clock(self._now),
        )
        text = self._rendered(given, now)
        masked, names, escapes = self._mask(given)
        if not names:
            return self._some(self._tokenizer.encode(text, special=True))
        try:
            again = self._rendered(masked, now)
        except (OptionError, BundleError):  # it looks at what its messages hold
            again = ""
        for escape, mark in escapes.items():
            again = again.replace(escape, mark)
        if _unmasked(again, names) == text:
            return self._some(self._encode_around(again, names))
        if self._specials(again) == self._specials(text):  # what the messages named, the template has left out
            return self._some(self._tokenizer.encode(text, special=True))
        raise OptionError(
            f"a message names {', '.join(sorted(set(names.values())))}, and the chat template treats it so that it "
            "cannot be told from a special token of its own; take it out of the message"
        )

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set: ``messages``, and such as ``tools`` or ``enable_thinking``.

        Raises:
            BundleError: the template is broken.
        """
        from jinja2 import meta

        from edgellm_runtime.text.template_language import environment

        assert self._template  # so that what is broken is told as broken
        return frozenset(meta.find_undeclared_variables(environment().parse(self.source)))

    def _given(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Objects | None,
        documents: Objects | None, variables: Mapping[str, Any] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """What the template gets from the caller, checked and plain."""
        checked = check_messages(messages, source=self.source)
        check_flag("add_generation_prompt", add_generation_prompt)
        others = check_inputs(tools, documents, variables)
        return {**others, "messages": checked, "add_generation_prompt": bool(add_generation_prompt)}

    def _rendered(self, given: Mapping[str, Any], now: Any) -> str:
        """The template's text."""
        from edgellm_runtime.text.template_language import TemplateRefusal
        from edgellm_runtime.text.template_limits import rendering

        given_size = sum(map(len, texts_of(given)))
        limit = _MAX_OVERHEAD + 4 * given_size
        parts: list[str] = []
        size = 0
        try:
            template = self._template
            with rendering(given_size):
                for part in template.generate({"strftime_now": now, **self._tokens, **given}):
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise self._broken(f"it writes more than {limit} characters")
        except TemplateRefusal as e:
            raise OptionError(
                f"the chat template refuses these messages: {first_line(e)}; change them accordingly"
            ) from e
        except (KeyboardInterrupt, SystemExit, BundleError):
            raise
        except Exception as e:  # a template can raise anything that Python can
            raise self._broken(first_line(e)) from e
        return "".join(parts)

    def _encode_around(self, text: str, names: Mapping[str, str]) -> list[int]:
        """The ids of a text with marks: special tokens, and plain characters with the names put back between them."""
        ids: list[int] = []
        at = 0
        for start, end, token in [*self._tokenizer.special_spans(text), (len(text), len(text), -1)]:
            ids += self._tokenizer.encode(_unmasked(text[at:start], names)) if at < start else []
            ids += [token] if token >= 0 else []
            at = end
        return ids

    def _some(self, ids: list[int]) -> list[int]:
        if not ids:
            raise self._broken("what it writes has no tokens")
        return ids

    def _specials(self, text: str) -> list[int]:
        return [token for _, _, token in self._tokenizer.special_spans(text)]

    def _mask(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
        """What is given, with marks, private-use characters, for the names of special tokens.

        Returns:
            The masked data; what each mark stands for; and for the escape that JSON has for a mark, which a template
            may write, the mark that stands for the name so written.
        """
        used = set(self.source).union(*texts_of(given))
        free = (chr(c) for c in _PRIVATE if chr(c) not in used)
        marks: dict[str, str] = {}

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                return self._masked(value, marks, free)
            if isinstance(value, dict):
                return {key: masked(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(map(masked, value))
            return value

        hidden: dict[str, Any] = masked(given)
        names, escapes = {mark: name for name, mark in marks.items()}, dict[str, str]()
        for name, mark in marks.items():
            written = escapes[_escaped(mark)] = next(free)
            names[written] = _escaped(name)
        return hidden, names, escapes

    def _masked(self, text: str, marks: dict[str, str], free: Any) -> str:
        while spans := self._tokenizer.special_spans(text):  # again, for one name may have hidden another
            at, parts = 0, list[str]()
            for start, end, _ in spans:
                # a token's span may take in the space around it, which the template is free to trim
                name = text[start:end].strip() or text[start:end]
                if not set(marks.values()).isdisjoint(name):
                    raise BundleError(
                        f"{self._path}: the tokenizer takes {name!r} for a special token, as it does with any text; "
                        "export the model with its own tokenizer"
                    )
                start = text.index(name, start)
                if name not in marks:
                    marks[name] = next(free)
                parts += [text[at:start], marks[name]]
                at = start + len(name)
            text = "".join(parts) + text[at:]
        return text

    @cached_property
    def source(self) -> str:
        """The template's text.

        Raises:
            BundleError: the file cannot be read, or is too long.
        """
        try:
            data = self._data
            if data is None:
                with self._path.open("rb") as file:
                    data = file.read(_MAX_SOURCE + 1)
            if len(data) > _MAX_SOURCE:
                raise self._broken(f"it is longer than {_MAX_SOURCE} bytes")
            return data.decode()
        except (OSError, UnicodeDecodeError) as e:
            raise self._broken(first_line(e)) from e

    @cached_property
    def _tokens(self) -> dict[str, str]:
        if self._tokenizer.special_tokens:
            return dict(self._tokenizer.special_tokens)
        named = {"bos_token": self._tokenizer.bos_token_id, "eos_token": self._tokenizer.eos_token_id}
        texts = {name: self._tokenizer.token_text(token) for name, token in named.items()}
        return {name: text for name, text in texts.items() if text is not None}

    @cached_property
    def _template(self) -> Template:
        from edgellm_runtime.text.template_language import environment
        from edgellm_runtime.text.template_limits import rendering

        try:
            with rendering():  # constants are computed when it is compiled
                template: Template = environment().from_string(self.source)
        except (KeyboardInterrupt, SystemExit, BundleError):
            raise
        except Exception as e:  # besides syntax errors, the parser runs into Python's own limits
            raise self._broken(first_line(e)) from e
        return template

    def _broken(self, why: str) -> BundleError:
        return BundleError(f"{self._path}: the chat template failed ({why}); correct it and export the model again")


def _escaped(text: str) -> str:
    """As JSON of ASCII writes it."""
    return json.dumps(text, allow_nan=False)[1:-1]


def _unmasked(text: str, names: Mapping[str, str]) -> str:
    for mark, name in names.items():
        text = text.replace(mark, name)
    return text
