"""The methods of a model that was trained for a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from edgellm_runtime.errors import BundleError, OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.tasks.runner import Answer, RoleLabels, TaskRunner

__all__ = ["TaskMethods"]


class TaskMethods(ABC):
    """What ``Model`` does by its task."""

    session: Session
    bundle: Bundle

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's."""

    @cached_property
    def task(self) -> TaskRunner:
        """The task that the model was trained for.

        Raises:
            OptionError: it was trained for none, or the bundle has no tokenizer.
            BundleError: the tokenizer lacks a token of the task's prompts.
        """
        from edgellm_runtime.tasks.runner import TaskRunner

        spec, name = self.bundle.manifest.task, self.bundle.manifest.name
        if spec is None:
            raise OptionError(
                f"{name} was trained for no task; use generate, or load a bundle of `edgellm train --task`"
            )
        if self.tokenizer is None:
            raise OptionError(f"{name} has no tokenizer, so it cannot read text; export it with one")
        if missing := [s.value for s in spec.prompt if s.kind == "token" and self.tokenizer.token_id(s.value) is None]:
            raise BundleError(f"{name}: its tokenizer lacks {missing}, which its prompts need; export the model again")
        return TaskRunner(self.session, self.tokenizer, spec)

    @overload
    def translate(self, source: str, **options: Any) -> Answer: ...

    @overload
    def translate(self, source: Sequence[str], **options: Any) -> list[Answer]: ...

    def translate(self, source: str | Sequence[str], **options: Any) -> Answer | list[Answer]:
        """Translate; see :meth:`edgellm_runtime.tasks.runner.TaskRunner.translate` for options and errors."""
        found: Answer | list[Answer] = self.task.translate(source, **options)
        return found

    @overload
    def answer(self, question: str, context: str, **options: Any) -> Answer: ...

    @overload
    def answer(self, question: Sequence[str], context: str | Sequence[str], **options: Any) -> list[Answer]: ...

    def answer(
        self, question: str | Sequence[str], context: str | Sequence[str], **options: Any
    ) -> Answer | list[Answer]:
        """Answer from a context; see :meth:`edgellm_runtime.tasks.runner.TaskRunner.answer`."""
        found: Answer | list[Answer] = self.task.answer(question, context, **options)
        return found

    @overload
    def summarize(self, text: str, **options: Any) -> Answer: ...

    @overload
    def summarize(self, text: Sequence[str], **options: Any) -> list[Answer]: ...

    def summarize(self, text: str | Sequence[str], **options: Any) -> Answer | list[Answer]:
        """Summarize; see :meth:`edgellm_runtime.tasks.runner.TaskRunner.summarize`."""
        found: Answer | list[Answer] = self.task.summarize(text, **options)
        return found

    def label_roles(self, sentence: str | Sequence[str], predicate: int | str) -> RoleLabels:
        """Label who does what; see :meth:`edgellm_runtime.tasks.runner.TaskRunner.label_roles`."""
        return self.task.label_roles(sentence, predicate)
