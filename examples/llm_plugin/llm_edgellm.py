"""Bundles of edgellm as models of ``llm``: ``llm edgellm add BUNDLE``, then ``llm -m edgellm/NAME``.

A bundle is loaded with its first prompt, and stays for the process: in ``llm chat`` a turn reads only what is new.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import llm
from pydantic import Field

from edgellm_runtime import Generation, Model, PrefixCache, RuntimeFault, load
from edgellm_runtime.bundle import Bundle

__all__ = [
    "AsyncEdgellm", "Edgellm", "EdgellmEmbedding", "register_commands", "register_embedding_models", "register_models"
]  # fmt: skip

_PREFIX = "edgellm/"


class EdgellmOptions(llm.Options):
    """What ``-o NAME VALUE`` takes; what is not named is as the bundle's makers want it."""

    max_tokens: int | None = Field(default=None, ge=1, description="At most so many tokens of an answer")
    temperature: float | None = Field(default=None, ge=0, description="0 takes the most probable token")
    top_k: int | None = Field(default=None, ge=0, description="Keep the k most probable tokens; 0 keeps all")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Keep the fewest that sum to this probability")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Keep those at least so probable beside the best")
    repetition_penalty: float | None = Field(default=None, gt=0, description="Above 1: against what is there already")
    seed: int | None = Field(default=None, ge=0, description="Makes sampling repeatable")
    stop: str | None = Field(default=None, min_length=1, description="A text that ends the answer")

    def keywords(self) -> dict[str, Any]:
        """The same for edgellm's generating methods."""
        found = {name: value for name, value in self.model_dump().items() if value is not None}
        if "max_tokens" in found:
            found["max_new_tokens"] = found.pop("max_tokens")
        return found


class _Bundled:
    """What both kinds of model have.

    Args:
        name: that it was added under.
        path: of the bundle.
    """

    can_stream = True
    supports_schema = True
    Options = EdgellmOptions

    def __init__(self, name: str, path: Path) -> None:
        self.model_id, self._path = f"{_PREFIX}{name}", path

    @property
    def supports_conversation(self) -> bool:
        """Whether the bundle says how turns are written; llm asks before a second one."""
        try:
            info = Bundle(self._path, checksums=False).manifest.tokenizer
        except RuntimeFault:
            return True  # the prompt itself will tell what is wrong
        return info is not None and info.has_chat_template

    def _asked(self, prompt: llm.Prompt) -> tuple[Model, Any, dict[str, Any]]:
        """The model, the prompt as it takes it, and the options."""
        model = _load(self._path)
        options = prompt.options.keywords()
        if prompt.schema:
            options["grammar"] = model.grammar(json_schema=prompt.schema)
        messages = [{"role": message.role, "content": _text(message)} for message in prompt.messages]
        if model.has_chat_template:
            return model, model.chat_template.encode(messages), options
        return model, "\n\n".join(message["content"] for message in messages), options

    @staticmethod
    def _note(response: Any, generation: Generation | None) -> None:
        """What ``llm logs`` and ``llm -u`` show of an answer, one that was left early too."""
        if generation is None:
            return
        cached = {"cached": generation.cached_tokens} if generation.cached_tokens else None
        response.set_usage(input=generation.prompt_tokens, output=len(generation.tokens), details=cached)
        response.response_json = {
            "finish_reason": generation.finish_reason,
            "decode_tokens_per_s": round(generation.timings.decode_tokens_per_s, 1),
            "ttft_ms": round(generation.timings.ttft_ms, 1),
        }


class Edgellm(_Bundled, llm.Model):
    """A bundle that llm can ask."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        """The answer, in one piece or as its tokens come."""
        try:
            model, asked, options = self._asked(prompt)
            with model.stream(asked, **options) as chunks:
                pieces = (chunk.text for chunk in chunks if chunk.text)
                yield from pieces if stream else ["".join(pieces)]
        except RuntimeFault as error:
            raise llm.ModelError(str(error)) from error
        self._note(response, chunks.generation)


class AsyncEdgellm(_Bundled, llm.AsyncModel):
    """The same for asyncio: each step runs in a worker thread."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncIterator[str]:
        """The answer, in one piece or as its tokens come."""
        try:
            model, asked, options = self._asked(prompt)
            async with model.astream(asked, **options) as chunks:
                whole = ""
                async for chunk in chunks:
                    if stream and chunk.text:
                        yield chunk.text
                    whole += chunk.text
                if not stream:
                    yield whole
        except RuntimeFault as error:
            raise llm.ModelError(str(error)) from error
        self._note(response, chunks.generation)


class EdgellmEmbedding(llm.EmbeddingModel):
    """A bundle that was exported with ``--hidden``, as a model of ``llm embed``.

    Args:
        name: that it was added under.
        path: of the bundle.
    """

    batch_size = 16

    def __init__(self, name: str, path: Path) -> None:
        self.model_id, self._path = f"{_PREFIX}{name}", path

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """A vector of length 1 for each text."""
        try:
            vectors = _load(self._path).embed([str(item) for item in items])
        except RuntimeFault as error:
            raise llm.ModelError(str(error)) from error
        yield from vectors.tolist()


@functools.cache
def _load(path: Path) -> Model:
    return load(path, prefix_cache=PrefixCache())


def _text(message: Any) -> str:
    """A message's text.

    Raises:
        ModelError: it has something else, such as an image or a tool's result.
    """
    if other := next((part for part in message.parts if not hasattr(part, "text")), None):
        raise llm.ModelError(f"edgellm's models read text, and this message has a {type(other).__name__}; leave it out")
    return "".join(part.text for part in message.parts if type(part).__name__ == "TextPart")


def _registry() -> Path:
    return Path(llm.user_dir()) / "edgellm.json"


def _added() -> dict[str, str]:
    """Paths by name."""
    try:
        found = json.loads(_registry().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise click.ClickException(f"{_registry()} is damaged ({error}); delete it and add the bundles again") from None
    return {str(name): str(path) for name, path in found.items()}


def _write(added: dict[str, str]) -> None:
    draft = _registry().with_suffix(".new")
    draft.write_text(json.dumps(added, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(_registry())


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Every bundle that was added."""
    for name, path in _added().items():
        register(Edgellm(name, Path(path)), AsyncEdgellm(name, Path(path)))


@llm.hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """Every bundle that was added and gives hidden states; a damaged one is told of when it is asked."""
    for name, path in _added().items():
        try:
            hidden = Bundle(path, checksums=False).manifest.signature.hidden
        except RuntimeFault:
            continue
        if hidden is not None:
            register(EdgellmEmbedding(name, Path(path)))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """``llm edgellm``."""

    @cli.group(name="edgellm")
    def group() -> None:
        """Bundles of edgellm: which of them are models here."""

    @group.command()
    @click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
    @click.option("--name", help="What to call it.  [default: the folder's name]")
    def add(bundle: Path, name: str | None) -> None:
        """Make the model in BUNDLE known as edgellm/NAME."""
        name = name or bundle.resolve().name
        if not name.isprintable() or any(c.isspace() for c in name):
            raise click.ClickException(f"{name!r} has spaces or signs that no name can have; give another with --name")
        try:
            found = Bundle(bundle, checksums=False)
        except RuntimeFault as error:
            raise click.ClickException(str(error)) from None
        _write({**_added(), name: str(bundle.resolve())})
        click.echo(f"{_PREFIX}{name}: {found.manifest.name}, context {found.manifest.max_context:,}")

    @group.command(name="list")
    def list_() -> None:
        """The bundles that are known, and where they are."""
        for name, path in _added().items():
            click.echo(f"{_PREFIX}{name}\t{path}")

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget edgellm/NAME; the bundle's files stay."""
        added = _added()
        if added.pop(name.removeprefix(_PREFIX), None) is None:
            raise click.ClickException(f"no {name!r}; known are {', '.join(added) or 'none'}")
        _write(added)
