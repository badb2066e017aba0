"""Texts as vectors: a model's last hidden states, pooled over each text's tokens."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_choice, check_flag, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.prompts import Tokens, is_batch, prompt_tokens
from edgellm_runtime.generation.stream import in_worker
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["EmbeddingMethods", "Pooling", "embed_rows"]

Pooling = Literal["mean", "last"]
_Work = Callable[[threading.Event | None], NDArray[np.float32]]
_TOGETHER = 2048  # tokens of a batch, padding among them
_ROWS = 16


def embed_rows(
    session: Session, rows: Sequence[Sequence[int]], *, pooling: Pooling = "mean", normalize: bool = True,
    cancelled: threading.Event | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """A vector of each row.

    Args:
        session: of a bundle that gives hidden states.
        rows: token ids, at least one each, of at most the context.
        pooling: over the hidden states of all tokens their ``mean``, or that of the ``last``.
        normalize: whether vectors have length 1.
        cancelled: once it is set, no further batch is read, and rows that are not are left 0.

    Returns:
        (rows, features).

    Raises:
        OptionError: the bundle gives no hidden states.
    """
    session.check_hidden()
    found = np.zeros((len(rows), session.hidden_width), dtype=np.float32)
    for batch in _batches([len(row) for row in rows], session):
        if cancelled is not None and cancelled.is_set():
            break
        lengths = np.array([len(rows[i]) for i in batch], dtype=np.int32)
        tokens = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
        for at, i in enumerate(batch):
            tokens[at, : len(rows[i])] = rows[i]
        state = session.new_state(len(batch), tokens.shape[1])
        ragged = None if (lengths == lengths[0]).all() else lengths
        _, hidden = session.step_hidden(tokens, state, lengths=ragged, logits="none")
        for at, i in enumerate(batch):
            own = hidden[at, : lengths[at]]
            found[i] = own[-1] if pooling == "last" else own.mean(axis=0, dtype=np.float64)
    if normalize:
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        found /= np.where(norms == 0, np.float32(1), norms)
    return found


def _batches(lengths: Sequence[int], session: Session) -> Iterator[list[int]]:
    """Rows to read together: of like lengths, so that little is padding. What takes several steps is read alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        alone = session.fixed_capacity or lengths[i] > session.chunk
        if batch and (alone or len(batch) == _ROWS or (len(batch) + 1) * lengths[i] > _TOGETHER):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class EmbeddingMethods(ABC):
    """What ``Model`` has of it."""

    session: Session

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's."""

    @abstractmethod
    def _check_goes_on(self) -> None: ...

    def embed(
        self, texts: str | Tokens | Sequence[str] | Sequence[Tokens], *, pooling: Pooling = "mean",
        normalize: bool = True, truncate: bool = False,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Texts as vectors, for a bundle that was exported with ``--hidden``.

        Args:
            texts: a text or token ids; or a list of either. A text begins with a begin token where the model's prompts
                do.
            pooling: ``mean`` of the last hidden states of a text's tokens, or that of its ``last`` token.
            normalize: whether vectors have length 1, so that their dot product is their cosine.
            truncate: whether of a text that is longer than the context its beginning counts; else it is refused.

        Returns:
            (features,) of one text; (texts, features) of a list.

        Raises:
            OptionError: the bundle gives no hidden states, or texts of the wrong kind.
            ContextError: a text is longer than the context.
        """
        return self._embedding(texts, pooling, normalize, truncate)(None)

    async def aembed(
        self, texts: str | Tokens | Sequence[str] | Sequence[Tokens], *, pooling: Pooling = "mean",
        normalize: bool = True, truncate: bool = False,
    ) -> NDArray[np.float32]:  # fmt: skip
        """:meth:`embed` for asyncio, in a worker thread; to cancel the task ends it between two batches.

        Args:
            texts: as for :meth:`embed`, which see for what is returned and raised too.
            pooling: likewise.
            normalize: likewise.
            truncate: likewise.
        """
        work, cancelled = self._embedding(texts, pooling, normalize, truncate), threading.Event()
        return await in_worker(lambda: work(cancelled), cancelled.set)

    def text_tokens(self, texts: Any, *, truncate: bool = False) -> list[list[int]]:
        """The tokens that :meth:`embed` reads of each of a list of texts; raises as it does."""
        one = len(texts) == 1
        return [
            prompt_tokens(text, self.session, self.tokenizer, name="the text" if one else f"text {i}", cut=truncate)
            for i, text in enumerate(texts)
        ]

    def _embedding(self, texts: Any, pooling: Any, normalize: Any, truncate: Any) -> _Work:
        """Checked: what is left to do."""
        self._check_goes_on()
        self.session.check_hidden()
        check_choice("pooling", pooling, get_args(Pooling))
        normalize, truncate = check_flag("normalize", normalize), check_flag("truncate", truncate)
        many = is_batch(texts)
        if not many and not isinstance(texts, str) and not hasattr(texts, "__len__"):
            raise OptionError(f"texts is {shown(texts)}; it must be a text, token ids or a list of either")
        rows = self.text_tokens(texts if many else [texts], truncate=truncate)

        def work(cancelled: threading.Event | None) -> NDArray[np.float32]:
            found = embed_rows(self.session, rows, pooling=pooling, normalize=normalize, cancelled=cancelled)
            return found if many else found[0]

        return work
