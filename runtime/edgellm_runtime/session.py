"""Running a bundle's graph: any number of tokens, any rows, the state from step to step. No text here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import (
    check_choice,
    check_instance,
    check_integer,
    check_integers,
    check_progress,
    check_text,
    shown,
)
from edgellm_runtime.backends import Backend, Candidates, check_updates
from edgellm_runtime.backends.draft_graph import DraftGraph
from edgellm_runtime.bundle.encoder_info import EncoderInfo
from edgellm_runtime.errors import ContextError, OptionError, StateError
from edgellm_runtime.spec import ADAPTER, Signature
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import Storage
from edgellm_runtime.text.sources import padded_sources, whole_numbers

if TYPE_CHECKING:
    from edgellm_runtime.backends.own_kernels import OwnKernels

__all__ = ["Session", "Wanted"]

Array = NDArray[Any]
Wanted = Literal["last", "all", "none"]
Tokens = Sequence[int] | NDArray[np.integer[Any]]
_Progress = Callable[[int, int], None]
_CHUNK = 512  # tokens a step; long prompts are cut, so that scratch memory does not grow with them


class Session:
    """Steps of one bundle.

    Args:
        backend: executes the graph.
        signature: what the graph takes, gives and carries.
        max_context: the most tokens a row may hold.
        ragged_chunks: whether the graph takes several tokens for several rows over a filled cache at once; if not, such
            rows are stepped one by one.
        chunk: the most tokens of a row in one step; a model that reads rows in one pass takes whole ones.
        vocab_size: how many tokens there are; None: as many as logits.
        capacity: slots that each row of a state has, for graphs of fixed sizes; None: as many as are needed.
        encoder: of a model that answers sources; None: it goes on with texts.
        drafter: proposes tokens from hidden states; None: the bundle has none.
        adapters: names of those that a row may have one of.

    Raises:
        BackendError: the backend cannot keep one of the model's states.
    """

    def __init__(
        self, backend: Backend, signature: Signature, *, max_context: int, ragged_chunks: bool, chunk: int = _CHUNK,
        vocab_size: int | None = None, capacity: int | None = None, encoder: EncoderInfo | None = None,
        drafter: DraftGraph | None = None, adapters: Sequence[str] = (),
    ) -> None:  # fmt: skip
        check_updates(backend, signature)
        self._backend, self.signature, self.one_pass = backend, signature, signature.one_pass
        self.max_context, self._ragged_chunks = max_context, ragged_chunks
        self.chunk = max_context if self.one_pass else chunk
        self._capacity, self.encoder, self.drafter = capacity, encoder, drafter
        self._why_shorter, self.adapters = "", tuple(adapters)
        self.adapter: str | None = None  # of the states that new_state makes
        self.width = int(signature.outputs[0].shape[-1])
        self.vocab_size = vocab_size or self.width

    @property
    def context_words(self) -> str:
        """The context for messages, with what has made it shorter than the model's own."""
        return f"{self.max_context}{self._why_shorter}"

    def shorten(self, context: int, why: str) -> None:
        """Let rows hold fewer tokens than the model could.

        Args:
            context: at most so many.
            why: for messages.
        """
        whole, self.max_context = self.max_context, check_integer("context", context, 1, self.max_context)
        self._why_shorter = f" ({why}; the model's own is {whole})"

    @property
    def predicts_tokens(self) -> bool:
        """Whether logits are over the vocabulary, of what comes next, and not over labels."""
        return self.width == self.vocab_size and not self.one_pass

    @property
    def device(self) -> str:
        """Where the graph runs."""
        return self._backend.device

    @property
    def threads(self) -> int:
        """Of a step, on the CPU."""
        return int(getattr(self._backend, "threads", 1))

    @property
    def kernels(self) -> OwnKernels | None:
        """Those of edgellm's own that run some of its products; None where all are the library's."""
        found: OwnKernels | None = getattr(self._backend, "kernels", None)
        return found

    @property
    def storage(self) -> Storage:
        """Where its states live; what ``State.load`` is given for a state that is to go on here."""
        return self._backend.storage

    @property
    def candidates(self) -> int:
        """How many tokens of a row :meth:`best` can choose by itself; 0: logits are here, and it is not asked."""
        return min(self._backend.candidates, self.width)

    def with_adapter(self, name: str | None) -> Session:
        """The same steps, for states of rows with an adapter.

        Args:
            name: of the adapter; None for the model without one.

        Raises:
            OptionError: the model has none of that name.
        """
        if name is not None and check_text("adapter", name) not in self.adapters:
            has = f"this one has {', '.join(self.adapters)}" if self.adapters else "this one was exported with none"
            raise OptionError(f"the model has no adapter {shown(name)}; {has}")
        found = copy.copy(self)
        found.adapter = name
        return found

    def adapted(self, state: State) -> bool:
        """Whether every row of a state is of this session's adapter."""
        return not self.adapters or bool((state.read(ADAPTER) == self._number).all())

    @property
    def _number(self) -> int:
        return 0 if self.adapter is None else self.adapters.index(self.adapter) + 1

    def new_state(self, batch: int = 1, capacity: int = 0, *, sources: Sequence[Tokens] | None = None) -> State:
        """The state of rows that hold no token yet.

        Args:
            batch: rows; as many as there are sources, where there are.
            capacity: tokens that each row is expected to hold; more can come later.
            sources: token ids that each row is to answer, for a model with an encoder, which reads them now.

        Raises:
            OptionError: not whole numbers, no row, no sources for a model that answers them, or a wrong one.
            ContextError: a source is too long.
            StateError: memory does not hold it.
        """
        batch, capacity = check_integer("batch", batch, 1, 2**31 - 1), check_integer("capacity", capacity, 0)
        storage, slots = self._backend.storage, self._slots(capacity)
        if self.encoder is None and sources is None:
            state = State(self.signature.state, batch, slots, storage)
            if self.adapters:  # also for none, for memory may have been another state's
                spec = next(spec for spec in self.signature.state if spec.name == ADAPTER)
                storage.write(spec, state.tensors[ADAPTER], np.full((batch, 1), self._number, dtype=np.int32))
            return state
        return self._encoded(sources, slots)

    def _encoded(self, sources: Sequence[Tokens] | None, slots: int, room: int = 0) -> State:
        tokens, lengths = padded_sources(sources, self.encoder, self.vocab_size, room)
        state = State(self.signature.state, len(tokens), slots, self._backend.storage, tokens.shape[1])
        self._backend.encode(tokens, lengths, state)
        return state

    def padding(self, width: int) -> State:
        """A row whose source is one token and padding, as the encoder marks that.

        Args:
            width: tokens of the source, padding among them.
        """
        assert self.encoder is not None, "asked for rows that have sources"
        return self._encoded([self.encoder.start[:1]], self._slots(1), width)

    def _slots(self, capacity: int) -> int:
        return self._backend.storage.rounded(self._capacity or min(max(capacity, 1), self.max_context))

    def step(
        self, tokens: Array, state: State, *, lengths: Array | None = None, logits: Wanted = "last",
        progress: _Progress | None = None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """Read more tokens into the state.

        Args:
            tokens: (batch, time) whole numbers in the vocabulary; rows may be padded at the end.
            state: stepped in place.
            lengths: (batch,), how many tokens of each row are valid, at least 1; None when all are.
            logits: those of each row's ``last`` valid token, of ``all`` positions, or ``none``.
            progress: told after each piece of a long chunk how many tokens of how many, all rows together, have been
                read. What it raises ends the step there and comes through.

        Returns:
            Logits (batch, 1 | longest row | 0, width); the array may be overwritten by the next step.

        Raises:
            ContextError: a row would hold more than ``max_context`` tokens.
            OptionError: tokens outside the vocabulary, lengths outside the chunk, or an argument of the wrong kind.
            StateError: another number of rows than the state's, or the state of another model.
        """
        return self._step(tokens, state, lengths, logits, progress, None)

    def _step(
        self, tokens: Array, state: State, lengths: Array | None, logits: Wanted, progress: _Progress | None,
        hidden: list[Array] | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """One step; into ``hidden``, if it is wanted, the hidden states piece by piece."""
        tokens = whole_numbers(tokens)
        batch, time = self._check(tokens, state)
        check_choice("logits", logits, get_args(Wanted))
        check_progress(progress)
        if lengths is None:
            valid = np.full(batch, time, dtype=np.int32)
        else:
            given = check_integers("lengths", lengths)
            if given.shape != (batch,) or (given < 1).any() or (given > time).any():
                raise OptionError(
                    f"lengths {shown(given.tolist())} for {batch} rows of {time} tokens; each must be 1 to {time}"
                )
            valid = given.astype(np.int32)
            tokens = tokens[:, : valid.max()]  # what is padding in every row is not worth computing
            time = tokens.shape[1]
        if (total := int((state.lengths + valid).max())) > self.max_context:
            raise ContextError(
                f"{total} tokens do not fit into the model's context of {self.context_words}; shorten the prompt"
            )
        state.reserve(self._capacity or int(state.lengths.max()) + time)
        if time > 1 and batch > 1 and not self._ragged_chunks and (state.lengths.any() or time > self.chunk):
            return self._rows(tokens, valid, state, logits, progress, hidden)
        if time <= self.chunk:
            result = self._run(tokens, valid, state, logits, hidden)
            if progress is not None:
                progress(int(valid.sum()), int(valid.sum()))
            return result
        return self._chunks(tokens, valid, state, logits, progress, hidden)

    @property
    def fixed_capacity(self) -> bool:
        """Whether each row of a state takes the memory of the whole context from the start."""
        return self._capacity is not None

    @property
    def hidden_width(self) -> int:
        """Features of a hidden state; 0: the bundle gives none."""
        spec = self.signature.hidden
        return 0 if spec is None else int(spec.shape[-1])

    def step_hidden(
        self, tokens: Array, state: State, *, lengths: Array | None = None, logits: Wanted = "last",
        progress: _Progress | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """:meth:`step`, and what the logits are projected from: the model's last hidden state, behind its last norm.

        Args:
            tokens: as for :meth:`step`, which see for what is raised too.
            state: likewise.
            lengths: likewise.
            logits: likewise.
            progress: likewise.

        Returns:
            The logits, and hidden states (batch, longest row, :attr:`hidden_width`), those of padding without meaning.
            The next step may overwrite the logits.

        Raises:
            OptionError: the bundle gives no hidden states.
        """
        self.check_hidden()
        pieces: list[Array] = []
        found = self._step(tokens, state, lengths, logits, progress, pieces)
        return found, np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def check_hidden(self) -> None:
        """See that the bundle gives hidden states.

        Raises:
            OptionError: it does not.
        """
        if not self.hidden_width:
            raise OptionError("the bundle gives no hidden states; export the model again with --hidden")

    def best(self, tokens: Array, state: State, count: int) -> Candidates:
        """Read one token a row into the state; the likeliest next ones, chosen where the logits are.

        Args:
            tokens: (batch, 1).
            state: stepped in place.
            count: how many a row, at most :attr:`candidates`.

        Raises:
            ContextError: a row would hold more than ``max_context`` tokens.
            OptionError: tokens outside the vocabulary, or a count outside its range.
            StateError: another number of rows than the state's.
        """
        tokens = whole_numbers(tokens)
        batch, time = self._check(tokens, state)
        if time != 1:
            raise OptionError(f"tokens of shape {tokens.shape}; choosing takes one token a row")
        count = check_integer("count", count, 1, self.candidates)
        if (total := int(state.lengths.max()) + 1) > self.max_context:
            raise ContextError(
                f"{total} tokens do not fit into the model's context of {self.context_words}; shorten the prompt"
            )
        state.reserve(self._capacity or total)
        lengths = np.ones(batch, dtype=np.int32)
        found = self._backend.best(tokens, lengths, np.zeros((batch, 1), dtype=np.int64), state, count)
        state.lengths += lengths
        return found

    def _check(self, tokens: Array, state: State) -> tuple[int, int]:
        check_instance("state", state, State, "session.new_state() makes one")
        if state.declared is not self.signature.state and state.declared != tuple(self.signature.state):
            raise StateError("the state is another model's; make one with this session's new_state()")
        if type(state.storage) is not type(self.storage):
            raise StateError(
                f"the state is not where the session's are, on {self.device}; make it with session.new_state(), or "
                "load it with storage=session.storage"
            )
        if tokens.ndim != 2 or not tokens.size:
            raise OptionError(f"tokens of shape {tokens.shape}; they must be (rows, tokens), at least one of each")
        if tokens.shape[0] != state.batch:
            raise StateError(f"tokens for {tokens.shape[0]} rows, but the state has {state.batch}")
        if self.one_pass and state.lengths.any():
            raise StateError(
                "the model reads rows in one pass, for their tokens see those after them; give whole rows to a new "
                "state"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            worst = int(tokens.max() if tokens.max() >= self.vocab_size else tokens.min())
            raise OptionError(
                f"token {worst} is outside the vocabulary of {self.vocab_size}; use the bundle's tokenizer"
            )
        return tokens.shape[0], tokens.shape[1]

    def _run(self, tokens: Array, lengths: Array, state: State, logits: Wanted, hidden: list[Array] | None) -> Array:
        batch, time = tokens.shape
        # one row of logits costs little, and a graph with none at all is nothing to rely on
        every = logits == "all"
        positions = np.broadcast_to(np.arange(time), (batch, time)) if every else (lengths - 1)[:, None]
        if hidden is None:
            result = self._backend.run(tokens, lengths, positions, state)
        else:
            result, given = self._backend.run_hidden(tokens, lengths, positions, state)
            hidden.append(given.copy())
        state.lengths += lengths
        return result if logits != "none" else result[:, :0]

    def _chunks(
        self, tokens: Array, lengths: Array, state: State, logits: Wanted, progress: _Progress | None,
        hidden: list[Array] | None,
    ) -> Array:  # fmt: skip
        """One step after another over pieces of a long chunk; rows that have ended wait."""
        batch, time = tokens.shape
        if batch > 1 and (lengths != time).any():
            return self._rows(tokens, lengths, state, logits, progress, hidden)
        pieces: list[Array] = []
        for start in range(0, time, self.chunk):
            piece = tokens[:, start : start + self.chunk]
            last = start + self.chunk >= time
            wanted: Wanted = logits if logits == "all" or last else "none"
            valid = np.minimum(lengths - start, piece.shape[1]).astype(np.int32)
            out = self._run(piece, valid, state, wanted, hidden)
            if progress is not None:
                progress(batch * min(start + self.chunk, time), batch * time)
            pieces.append(out.copy() if logits == "all" and not last else out)
        return np.concatenate(pieces, axis=1) if logits == "all" else pieces[-1]

    def _rows(
        self, tokens: Array, lengths: Array, state: State, logits: Wanted, progress: _Progress | None,
        hidden: list[Array] | None,
    ) -> Array:  # fmt: skip
        """Each row on its own, its padding left away."""
        count = {"last": 1, "all": tokens.shape[1], "none": 0}[logits]
        result = np.zeros((state.batch, count, self.width), dtype=np.float32)
        if hidden is not None:
            hidden.append(np.zeros((*tokens.shape, self.hidden_width), dtype=np.float32))
        for row in range(state.batch):
            alone = state.take([row])
            told = None if progress is None else _after(progress, int(lengths[:row].sum()), int(lengths.sum()))
            own: list[Array] | None = None if hidden is None else []
            out = self._step(tokens[row : row + 1, : lengths[row]], alone, None, logits, told, own)
            result[row, : out.shape[1]] = out[0]
            if hidden is not None and own is not None:
                hidden[-1][row, : lengths[row]] = np.concatenate(own, axis=1)[0]
            state.put(row, alone)
        return result


def _after(progress: _Progress, before: int, total: int) -> _Progress:
    """The progress of one row, told as that of all."""
    return lambda done, _: progress(before + done, total)
