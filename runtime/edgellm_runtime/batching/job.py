"""A request that is run: a prompt, the answers that are wanted to it, and who is told of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgellm_runtime.batching.reading import Reading
from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.answer import Chunk, Generation, Timings
from edgellm_runtime.generation.logprobs import TokenLogprobs
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.generation.row import Row
from edgellm_runtime.generation.sampling import Sampler
from edgellm_runtime.generation.trail import Trail
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Answer", "Event", "Job", "Sink"]


@dataclass(frozen=True, slots=True)
class Event:
    """What a job is told.

    Args:
        answer: which of its answers.
        chunk: a piece of it.
        generation: the whole of it, with its last chunk.
        error: in place of a chunk; none of the job's answers goes on.
    """

    answer: int
    chunk: Chunk | None = None
    generation: Generation | None = None
    error: BaseException | None = None


Sink = Callable[[Event], None]


class Answer:
    """One of a job's answers while it is made.

    Args:
        index: which.
        row: its tokens and text.
        sampler: chooses them.
        logprobs: how many of the most probable tokens are wanted beside each; None: no log-probabilities.
    """

    def __init__(self, index: int, row: Row, sampler: Sampler, logprobs: int | None) -> None:
        self.index, self.row, self.sampler, self.logprobs = index, row, sampler, logprobs
        self.token = 0  # the last one chosen, not read yet
        self.began = 0.0  # when its first token was there
        self.trail: Trail | None = None  # snapshots that the next prompt may go on from, where a cache is kept


class Job:
    """A request that waits, is read or is answered: a prompt and the answers to it.

    Args:
        prompt: token ids; a source, where the model has an encoder.
        options: of every answer; answer ``i`` draws with the seed ``seed + i``.
        answers: how many.
        sink: is told of each piece, on the thread that steps the model, which it must not hold up.
        now: by the clock of whoever steps it.
        session: will step it.
        tokenizer: gives answers a text.
        context: the most tokens that prompt and answer may have.
        prompt_logprobs: so many of the most probable tokens are wanted beside each of the prompt's; None: nothing is
            said of the prompt, which need not be read where no token follows.

    Raises:
        OptionError: an option names a token that the model does not have, or another number of seeds.
    """

    def __init__(
        self, prompt: Sequence[int], options: GenerationOptions, answers: int, sink: Sink, now: float, *,
        session: Session, tokenizer: Tokenizer | None, context: int, prompt_logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self.prompt, self.options, self.sink = tuple(prompt), options, sink
        encoder = session.encoder
        self.source = None if encoder is None else self.prompt  # which an encoder reads before the first step
        self.begins = self.prompt if encoder is None else encoder.start  # what steps read: answers begin alike
        self.prompt_logprobs = prompt_logprobs
        self.submitted = now
        self.deadline = None if options.deadline is None else now + options.deadline
        self.cancelled = threading.Event() if options.cancel is None else options.cancel
        self.reading: Reading | None = None  # while the prompt is read
        self.read_logprobs: list[TokenLogprobs] | None = None  # of the prompt, once it is read
        self.cached = 0  # tokens of the prompt that had been read before
        self.prefill_s = self.ttft_s = 0.0
        self.failed = False
        seeds = options.seed
        if isinstance(seeds, Sequence) and len(seeds) != answers:
            raise OptionError(f"seed has {len(seeds)} numbers for {answers} answers; give one, or one for each")
        made = []
        for index in range(answers):
            seed = None if seeds is None else seeds[index] if isinstance(seeds, Sequence) else seeds + index
            own = replace(options, seed=seed)
            row = Row(self.begins, tokenizer, options, context - len(self.begins))
            sampler = Sampler(own, rows=1, vocab_size=session.vocab_size, ends=row.ends)
            sampler.observe(0, self.begins)
            if self.must_be_read:
                row.finish_reason = None  # however few tokens may follow
            made.append(Answer(index, row, sampler, options.logprobs))
        self.answers = tuple(made)

    @property
    def room(self) -> int:
        """The most tokens that one of its rows will hold."""
        return self.answers[0].row.room

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.failed or all(answer.row.finish_reason is not None for answer in self.answers)

    @property
    def must_be_read(self) -> bool:
        """Whether its prompt is asked about, even if no token is to follow."""
        return self.prompt_logprobs is not None

    def tell(self, answer: Answer, chunk: Chunk, now: float) -> None:
        """Pass a piece of an answer on. One whose reader cannot be told is cancelled."""
        generation = self._generation(answer, now) if chunk.finish_reason else None
        try:
            self.sink(Event(answer.index, chunk, generation))
        except Exception:  # its reader's own, who is gone
            self.cancelled.set()

    def fail(self, error: BaseException) -> None:
        """End every answer with an error."""
        if self.failed:
            return
        self.failed, self.reading = True, None
        try:
            self.sink(Event(0, error=error))
        except Exception:  # see tell
            self.cancelled.set()

    def _generation(self, answer: Answer, now: float) -> Generation:
        row = answer.row
        assert row.finish_reason is not None
        decode_s = max(now - answer.began, 0.0) if len(row.tokens) > 1 else 0.0
        timings = Timings(
            prefill_s=self.prefill_s, decode_s=decode_s, ttft_ms=1e3 * self.ttft_s,
            prefill_tokens_per_s=(len(self.prompt) - self.cached) / self.prefill_s if self.prefill_s else 0.0,
            decode_tokens_per_s=(len(row.tokens) - 1) / decode_s if decode_s else 0.0,
        )  # fmt: skip
        return Generation(
            text="".join(row.texts), tokens=tuple(row.tokens), prompt_tokens=len(self.prompt),
            finish_reason=row.finish_reason, timings=timings,
            logprobs=None if self.options.logprobs is None else tuple(row.logprobs), cached_tokens=self.cached,
            prompt_logprobs=None if self.read_logprobs is None else tuple(self.read_logprobs),
        )  # fmt: skip
