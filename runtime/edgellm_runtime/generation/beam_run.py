"""Answers by beam search, with the face of :class:`~edgellm_runtime.generation.generate.Run`; each is one chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from edgellm_runtime.errors import OptionError
from edgellm_runtime.generation.answer import Chunk
from edgellm_runtime.generation.beam import Hypothesis, Rules, follow_beams
from edgellm_runtime.generation.generate import Run
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.generation.penalties import chain_of
from edgellm_runtime.generation.processors import apply_processors
from edgellm_runtime.generation.row import Row
from edgellm_runtime.generation.row_options import RowOptions
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["BeamRun", "run_of"]

_Prompts = Sequence[Sequence[int]]


class BeamRun(Run):
    """The likeliest answers to a batch of prompts.

    Args:
        session: as for :class:`Run`, and so are the others.
        tokenizer: likewise.
        prompts: likewise.
        options: likewise; of each row ``beams`` and ``length_penalty`` count.
        answers: so many to each prompt, the best of its beams.
        **others: those of :class:`Run`.

    Raises:
        OptionError: more answers than beams, or a row that draws.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, prompts: _Prompts, options: RowOptions, *,
        answers: int = 1, **others: Any,
    ) -> None:  # fmt: skip
        for row in range(len(prompts)):
            _check(options.of(row), answers)
        super().__init__(session, tokenizer, prompts, options, **others)
        given = list(self._rows)
        spare = range(len(prompts), answers * len(prompts))
        context = session.max_context
        self._rows += [
            Row(given[i % len(given)].prompt, tokenizer, self._own.of(i % len(given)),
                context - len(given[i % len(given)].prompt)) for i in spare
        ]  # fmt: skip
        self._tokenizer = tokenizer

    def chunks(self) -> Generator[tuple[int, Chunk], None, None]:
        """Each answer whole, as (row, chunk), once all are there."""
        for i, row in enumerate(self._rows):
            if self._own.of(i % self._prompts).echo:
                yield i, row.echo()
            if row.finish_reason:
                yield i, Chunk("", (), row.finish_reason)
        if not self._batch:
            return
        found: list[list[Hypothesis]] = []
        start = time.perf_counter()
        try:
            if (logits := self._read()) is not None and self._state is not None:
                self._ttft_s = time.perf_counter() - start
                self._keep()
                rules = [self._rules(prompt) for prompt in self._read_rows()]
                found = follow_beams(self._session, self._state, logits, rules, lambda: self._ended() is not None)
                self._decode_s = time.perf_counter() - start - self._ttft_s
        finally:
            self._leave_states()
        for i, row in enumerate(self._rows):
            if row.finish_reason is None:
                yield i, self._whole(i, row, found)

    def _whole(self, i: int, row: Row, found: Sequence[Sequence[Hypothesis]]) -> Chunk:
        """An answer's tokens and text, all at once."""
        place = self._read_rows().index(i % self._prompts)
        answers = found[place] if found else ()
        if i // self._prompts >= len(answers):  # ended from outside, or fewer tokens are possible than beams
            return row.end(self._ended() or "length")
        best = answers[i // self._prompts]
        row.decode_s, texts, tokens = self._decode_s, list[str](), best.tokens
        row.logprobs = list(best.logprobs)
        for token in tokens if best.end is None else (*tokens, best.end):
            texts.append(row.push(token).text)
        reason = row.finish_reason
        if reason is None:
            last = row.end(self._ended() or "length")
            texts.append(last.text)
            reason = last.finish_reason
        return Chunk("".join(texts), tuple(row.tokens), reason)

    def _leave_states(self) -> None:
        """What each text's prompt left; the beams stepped copies of it."""
        state, read = self._state, self._read_rows()
        if self._resumed is not None and state is not None and not self._stepping:
            for i, row in enumerate(self._rows):
                row.state = state.take([read.index(i % self._prompts)])

    def _rules(self, prompt: int) -> Rules:
        options, row = self._own.of(prompt), self._rows[prompt]
        chain = chain_of(
            options, vocab_size=self._session.vocab_size, ends=row.ends, prompt=len(row.prompt),
            answer_from=self._answer_from(prompt),
        )  # fmt: skip
        before = np.array(row.prompt, dtype=np.int64)

        def changed(tokens: tuple[int, ...], logits: Any) -> Any:
            return apply_processors(chain, np.concatenate([before, np.array(tokens, dtype=np.int64)]), logits)

        return Rules(
            options.beams, row.left, row.ends, options.length_penalty, changed if chain else None,
            self._stopped(options, row), options.logprobs,
        )  # fmt: skip

    def _stopped(self, options: GenerationOptions, row: Row) -> Callable[[tuple[int, ...]], bool] | None:
        if not options.stop or self._tokenizer is None:
            return None
        tokenizer, stops = self._tokenizer, options.stop

        def stopped(tokens: tuple[int, ...]) -> bool:
            text = tokenizer.decode(tokens, after=row.prompt, skip_special=options.skip_special_tokens)
            return any(stop in text for stop in stops)

        return stopped


def run_of(session: Session, tokenizer: Tokenizer | None, prompts: _Prompts, options: RowOptions, **others: Any) -> Run:
    """What makes the answers: beams where any row asks for them.

    Args:
        session: as for :class:`Run`, and so are the others.
        tokenizer: likewise.
        prompts: likewise.
        options: likewise.
        **others: likewise.

    Raises:
        OptionError: as for both.
        ContextError: a prompt is longer than the context.
    """
    kind = BeamRun if any(options.of(row).beams > 1 for row in range(len(prompts))) else Run
    return kind(session, tokenizer, prompts, options, **others)


def _check(options: GenerationOptions, answers: int) -> None:
    if answers > options.beams:
        raise OptionError(f"{answers} answers of {options.beams} beams; follow at least as many beams")
    if options.temperature > 0:
        raise OptionError(
            f"temperature is {options.temperature:g} beside rows with beams, which draw nothing; set it to 0"
        )
