"""A bundle ready to generate: prompts in words, token ids or messages; answers whole or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.beam_run import run_of
from edgellm_runtime.generation.conversation import Conversation, TemplateInputs
from edgellm_runtime.generation.drafting import check_vocabulary
from edgellm_runtime.generation.embedding import EmbeddingMethods
from edgellm_runtime.generation.generate import Generation, GenerationOptions, OptionKeywords
from edgellm_runtime.generation.grammar_methods import GrammarMethods
from edgellm_runtime.generation.options import with_defaults
from edgellm_runtime.generation.prefix_cache import PrefixCache
from edgellm_runtime.generation.prompts import Tokens, is_batch
from edgellm_runtime.generation.request import Counts, Request
from edgellm_runtime.generation.row_options import RowOptions, own_options
from edgellm_runtime.generation.scoring import ScoringMethods
from edgellm_runtime.generation.state_methods import StateMethods
from edgellm_runtime.generation.stream import AsyncStream, Stream, in_worker
from edgellm_runtime.generation.text_state import TextState
from edgellm_runtime.session import Session
from edgellm_runtime.state.memory_need import MemoryNeed, memory_need
from edgellm_runtime.tasks.methods import TaskMethods
from edgellm_runtime.text.chat import ChatTemplate, Objects
from edgellm_runtime.text.messages import Message
from edgellm_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm_runtime.batching.options import BatchKeywords
    from edgellm_runtime.batching.scheduler import Scheduler
    from edgellm_runtime.bundle import Bundle

__all__ = ["Model"]


class Model(TaskMethods, GrammarMethods, StateMethods, ScoringMethods, EmbeddingMethods):
    """A language model on this device. Made by :func:`edgellm_runtime.load`.

    Every generating method takes the keywords of :class:`GenerationOptions`, among them ``max_new_tokens=256``,
    ``temperature=0.0`` and ``seed=None``; what is not given is what the model's makers ask for, in
    ``generation_defaults``, and else those values.

    Args:
        session: steps the model.
        tokenizer: or what makes it when it is first needed; None for a bundle without one, whose prompts are token ids
            and whose answers have no text.
        bundle: what was loaded.
        template: the chat template's source, where it has been read already.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | Callable[[], Tokenizer] | None, bundle: Bundle,
        template: bytes | None = None,
    ) -> None:  # fmt: skip
        self.session = session
        self._tokenizer = tokenizer
        self.bundle = bundle
        self._template = template
        self.prefix_cache: PrefixCache | None = None  # what prompts begin with, kept from call to call

    @property
    def device(self) -> str:
        """Where the model runs: ``cpu``, ``cuda`` or ``tensorrt``."""
        return self.session.device

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to token ids and back; None for a bundle without a tokenizer.

        Raises:
            BundleError: the bundle's file is no tokenizer, or names tokens that the model does not have.
        """
        if self._tokenizer is not None and not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        return self._tokenizer

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The options of generation that the bundle sets, as the checkpoint's makers did; empty: none."""
        return self.bundle.manifest.generation

    def __repr__(self) -> str:
        m = self.bundle.manifest
        return f"<Model {m.name}: {m.target['name']} {m.dtype}, on {self.device}, context {self.session.max_context}>"

    def memory(self, context: int | None = None, *, rows: int = 1) -> MemoryNeed:
        """Predicted bytes of the weights and of a state.

        Args:
            context: tokens in each row; None: as many as the model's context holds.
            rows: of the state.

        Raises:
            OptionError: a context that is longer than the model's, or no row.
        """
        context = self.session.max_context if context is None else context
        return memory_need(self.bundle.manifest, self.device, context, rows)

    @overload
    def generate(
        self, prompt: str | Tokens, *, state: TextState | None = None, best_of: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, n: int, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> list[list[Generation]]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: str | Tokens, *, n: int, state: TextState | None = None, best_of: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...  # fmt: skip

    def generate(
        self, prompt: Any, *, state: TextState | None = None, n: int | None = None, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> Any:  # fmt: skip
        """Go on from a prompt, or from each of a list of prompts in one batch.

        A row of a batch gets what its prompt gets alone, as far as the kernels round rows alike; with a seed, each row
        draws from its own generator begun from that seed. The names of special tokens in a text are plain characters;
        to use special tokens, encode the prompt with ``model.tokenizer.encode(text, special=True)``.

        A model with an encoder takes the prompt as a source and answers it: a translation of it, for example.

        Args:
            prompt: a text or token ids; or a list of texts or of lists of token ids, and then the answers are a list
                too, of none for an empty one.
            state: the text that one prompt goes on from, and what reading it left; it stays as it is, and the answer's
                ``state`` has the prompt and the answer too. The prompt may then be empty.
            n: so many answers to each prompt, as a list; the prompt is read once, and answer ``i`` is what the seed
                ``seed + i`` gives.
            best_of: so many answers are made, and the one, or the ``n``, with the highest mean log-probability of a
                token are given, the best first.
            row_options: of a list of prompts, a dict of options for each, which hold in the place of the call's.
            **options: those of :class:`GenerationOptions`.

        Raises:
            OptionError: an argument of the wrong kind or outside its range, or an empty prompt where the model has no
                bos token; of a batch, the prompt is named by its number.
            ContextError: a prompt is longer than the context.
            StateError: the state is another model's.
        """
        return self._request(prompt, state, Counts(n, best_of), options, row_options).answer()

    @overload
    async def agenerate(
        self, prompt: str | Tokens, *, state: TextState | None = None, best_of: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Generation: ...  # fmt: skip

    @overload
    async def agenerate(
        self, prompt: list[str] | list[list[int]], *, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...  # fmt: skip

    @overload
    async def agenerate(
        self, prompt: list[str] | list[list[int]], *, n: int, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> list[list[Generation]]: ...  # fmt: skip

    @overload
    async def agenerate(
        self, prompt: str | Tokens, *, n: int, state: TextState | None = None, best_of: int | None = None,
        **options: Unpack[OptionKeywords],
    ) -> list[Generation]: ...  # fmt: skip

    async def agenerate(
        self, prompt: Any, *, state: TextState | None = None, n: int | None = None, best_of: int | None = None,
        row_options: Sequence[OptionKeywords] | None = None, **options: Unpack[OptionKeywords],
    ) -> Any:  # fmt: skip
        """:meth:`generate` for asyncio, its steps in a worker thread; to cancel the task ends the answer.

        Args:
            prompt: as for :meth:`generate`, which see for what is returned and raised too.
            state: likewise.
            n: likewise.
            best_of: likewise.
            row_options: likewise.
            **options: those of :class:`GenerationOptions`.
        """
        request = self._request(prompt, state, Counts(n, best_of), options, row_options)
        return await in_worker(request.answer, request.cancel)

    def _request(
        self, prompt: Any, state: TextState | None, counts: Counts, given: OptionKeywords,
        row_options: Sequence[OptionKeywords] | None,
    ) -> Request:  # fmt: skip
        self._check_predicts()
        options = self._options(given)
        model = self._adapted(options)
        many = is_batch(prompt) and (len(prompt) > 0 or state is None)  # nothing, to a state, is an empty prompt
        if not many and row_options is not None:
            raise OptionError("row_options goes with a list of prompts; give one prompt its options themselves")
        if many:
            counts.check_single(state is not None, len(prompt))
            prompts = [self._tokens(p, f"prompt {i}") for i, p in enumerate(prompt)]
        else:
            prompts = [self._tokens(prompt) if state is None else model._text(prompt, state)]
        rows = None if row_options is None else own_options(row_options, len(prompts), given, self._options)
        if not prompts:
            return Request(None, 0, counts, options)
        run = run_of(
            model.session, self.tokenizer, prompts, counts.of(options, rows, len(prompts)), text_state=state,
            answers=counts.made, prefixes=model._prefixes,
        )  # fmt: skip
        return Request(run, len(prompts) if many else None, counts, options, rows)

    def stream(
        self, prompt: str | Tokens, *, state: TextState | None = None, **options: Unpack[OptionKeywords]
    ) -> Stream:
        """The same for one prompt, chunk by chunk; ``generation`` has the whole answer at the end.

        Args:
            prompt: a text or token ids.
            state: as for :meth:`generate`.
            **options: those of :class:`GenerationOptions`.

        Raises:
            OptionError: as for :meth:`generate`, at once and not at the first chunk.
            ContextError: likewise.
        """
        self._check_predicts()
        checked = self._options(options)
        model = self._adapted(checked)
        tokens = self._tokens(prompt) if state is None else model._text(prompt, state)
        rows, prefixes = RowOptions(checked), model._prefixes
        return Stream(run_of(model.session, self.tokenizer, [tokens], rows, text_state=state, prefixes=prefixes))

    def astream(
        self, prompt: str | Tokens, *, state: TextState | None = None, **options: Unpack[OptionKeywords]
    ) -> AsyncStream:
        """:meth:`stream` for asyncio: ``async for chunk in model.astream(...)``.

        Args:
            prompt: a text or token ids.
            state: as for :meth:`generate`.
            **options: those of :class:`GenerationOptions`.
        """
        return AsyncStream(self.stream(prompt, state=state, **options))

    def chat(
        self, messages: Sequence[Message], *, tools: Objects | None = None, documents: Objects | None = None,
        template_variables: Mapping[str, Any] | None = None, **options: Unpack[OptionKeywords],
    ) -> Generation:  # fmt: skip
        """The assistant's answer to messages, through the bundle's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` each; see
                :func:`~edgellm_runtime.text.messages.check_messages`.
            tools: JSON schemas of functions that the model may call.
            documents: what it may look at, ``{"title": ..., "text": ...}`` each.
            template_variables: the template's own, such as ``{"enable_thinking": False}``.
            **options: those of :class:`GenerationOptions`.

        Raises:
            OptionError: an option outside its range, malformed messages, or no chat template.
            ContextError: the messages are longer than the context.
        """
        prompt = self.chat_template.encode(
            messages, tools=tools, documents=documents, template_variables=template_variables
        )
        return self.generate(prompt, **options)

    def stream_chat(
        self, messages: Sequence[Message], *, tools: Objects | None = None, documents: Objects | None = None,
        template_variables: Mapping[str, Any] | None = None, **options: Unpack[OptionKeywords],
    ) -> Stream:  # fmt: skip
        """The same, chunk by chunk; it may be left at any time.

        Args:
            messages: as for :meth:`chat`.
            tools: likewise.
            documents: likewise.
            template_variables: likewise.
            **options: those of :class:`GenerationOptions`.

        Raises:
            OptionError: as for :meth:`chat`.
            ContextError: likewise.
        """
        prompt = self.chat_template.encode(
            messages, tools=tools, documents=documents, template_variables=template_variables
        )
        return self.stream(prompt, **options)

    def conversation(
        self, *, system: str | None = None, tools: Objects | None = None, documents: Objects | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Conversation:  # fmt: skip
        """A conversation that keeps its state between turns.

        Args:
            system: the system message, or None for the template's own.
            tools: as for :meth:`chat`, and so in every turn.
            documents: likewise.
            template_variables: likewise.

        Raises:
            OptionError: the bundle has no chat template.
        """
        template = self.chat_template
        assert self.tokenizer is not None
        inputs = TemplateInputs(tools=tools, documents=documents, template_variables=template_variables)
        defaults = self.generation_defaults
        return Conversation(
            self.session, self.tokenizer, template, system, inputs, defaults, self.bundle, self._prefixes
        )

    def load_conversation(self, path: str | Path) -> Conversation:
        """A conversation that ``Conversation.save`` wrote, here or in another process, with this very bundle.

        Raises:
            OptionError: the bundle has no chat template.
            StateError: no such file, a damaged one, or the state of another model or of another version of it.
        """
        found = self.conversation()
        found.restore(path)
        return found

    def scheduler(self, **options: Unpack[BatchKeywords]) -> Scheduler:
        """What runs the requests of many at once: they join and leave one batch.

        Args:
            **options: those of :class:`~edgellm_runtime.batching.options.BatchOptions`.

        Raises:
            OptionError: an option outside its range.
        """
        from edgellm_runtime.batching.options import BatchOptions
        from edgellm_runtime.batching.scheduler import Scheduler

        self._check_predicts()
        checked = BatchOptions(**options)
        return Scheduler(
            self.session, self.tokenizer, self._tokens, checked, defaults=self.generation_defaults,
            prefixes=self._prefixes,
        )  # fmt: skip

    @property
    def has_chat_template(self) -> bool:
        """Whether the bundle can turn messages into a prompt."""
        info = self.bundle.manifest.tokenizer
        return self._tokenizer is not None and info is not None and info.has_chat_template

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template.

        Raises:
            OptionError: it has none.
        """
        if self.tokenizer is None or not self.has_chat_template:
            raise OptionError(f"{self.bundle.manifest.name} has no chat template; use generate with a plain prompt")
        return ChatTemplate(self.bundle.file("chat_template.jinja"), self.tokenizer, self._template)

    def _options(self, options: OptionKeywords) -> GenerationOptions:
        """A caller's options, and the model's own for those that the caller does not name."""
        checked = with_defaults(self.generation_defaults, options)
        if isinstance(checked.draft, Model):
            check_vocabulary(checked.draft.bundle, self.bundle)
        return checked
