"""A model's methods that make, read and keep states of texts, and see that it can go on with a text at all."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgellm_runtime.arguments import check_instance, check_progress
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.drafting import BundleDrafter, Drafter
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.generation.prefix_cache import PrefixCache, Prefixes
from edgellm_runtime.generation.prompts import Tokens, prompt_tokens
from edgellm_runtime.generation.text_state import TextState
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle

__all__ = ["StateMethods"]


class StateMethods(ABC):
    """What ``Model`` does with states."""

    session: Session
    bundle: Bundle
    prefix_cache: PrefixCache | None

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that the bundle has."""
        return self.bundle.manifest.adapters

    @property
    def adapter(self) -> str | None:
        """The adapter that answers are made with where a call names no other; None: the model without one."""
        return self.session.adapter

    def with_adapter(self, name: str | None) -> Self:
        """The same model, in the same memory, with another adapter; both can be used.

        Args:
            name: one of :attr:`adapters`; None for none.

        Raises:
            OptionError: there is none of that name.
        """
        found = copy.copy(self)
        found.session = self.session.with_adapter(name)
        return found

    def _adapted(self, options: GenerationOptions) -> Self:
        return self if options.adapter is None else self.with_adapter(options.adapter)

    def new_state(self) -> TextState:
        """The state of an empty text, to be given to :meth:`generate`, :meth:`stream` or :meth:`read`."""
        self._check_goes_on()
        return TextState(self.session, self.bundle)

    def load_state(self, path: str | Path) -> TextState:
        """A state that ``TextState.save`` wrote, here or in another process, with this very bundle.

        Raises:
            StateError: no such file, a damaged one, or the state of another model or of another version of it.
        """
        self._check_goes_on()
        return TextState.load(path, self.session, self.bundle)

    def read(
        self, prompt: str | Tokens, *, state: TextState | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextState:  # fmt: skip
        """Read a prompt and answer nothing: a state that answers to what follows can go on from.

        Args:
            prompt: a text or token ids.
            state: what it goes on from, which stays as it is; None: an empty text.
            progress: as of :class:`GenerationOptions`.

        Raises:
            OptionError: as for :meth:`generate`.
            ContextError: likewise.
            StateError: likewise.
        """
        check_progress(progress)
        before = self.new_state() if state is None else state
        tokens = self._text(prompt, before)
        return before.read(tokens, self._prefixes, progress)

    @property
    def _prefixes(self) -> Prefixes | None:
        """The cache as this model uses it."""
        cache = self.prefix_cache
        return None if cache is None else Prefixes(cache, self.session, self.bundle.fingerprint)

    def _check_goes_on(self) -> None:
        self._check_predicts()
        if self.session.encoder is not None:
            raise OptionError(
                f"{self.bundle.manifest.name} answers sources and goes on with no text; use generate, with a list of "
                "sources for a batch"
            )

    def drafter(self) -> Drafter:
        """Drafts a text for another model, which is given this one as ``draft``."""
        self._check_goes_on()
        return BundleDrafter(self.session)

    def _check_predicts(self) -> None:
        if not self.session.predicts_tokens:
            raise OptionError(f"{self.bundle.manifest.name} labels words and writes no text; use label_roles")

    def _text(self, prompt: Any, state: TextState) -> list[int]:
        """The tokens of a state's text and a prompt that goes on with it."""
        check_instance("state", state, TextState, "model.new_state() makes one")
        state.check_for(self.session, self.bundle)
        return self._tokens(prompt, before=state.tokens)

    def _tokens(self, prompt: Any, name: str = "the prompt", before: Sequence[int] = ()) -> list[int]:
        return prompt_tokens(prompt, self.session, self.tokenizer, name=name, before=before)
