"""Answer each line of a file, several at a time: one model, a thread for each processor core.

python examples/embedding/pool.py BUNDLE prompts.txt --workers 4 > answers.txt
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edgellm_runtime import Generation, Model, load

__all__ = ["answers", "main"]


def answers(
    model: Model, prompts: Iterable[str], *, workers: int, cancel: threading.Event, max_new_tokens: int = 64,
    deadline: float | None = None,
) -> Iterator[Generation]:  # fmt: skip
    """The answers, in the prompts' order. No more than twice as many prompts as workers are taken ahead.

    Args:
        model: shared by the threads; load it with ``threads=1`` where there are as many workers as cores.
        prompts: as long a series as you like.
        workers: threads.
        cancel: once it is set, running answers end at their next token.
        max_new_tokens: of each answer.
        deadline: seconds that an answer may take; it then ends with what it has.
    """
    waiting = collections.deque[Future[Generation]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for prompt in prompts:
                waiting.append(
                    pool.submit(model.generate, prompt, max_new_tokens=max_new_tokens, cancel=cancel, deadline=deadline)
                )
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:  # an answer that failed, Ctrl-C, or a reader who has left: nobody wants the others
            cancel.set()
            raise


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answer each line of a file, several at a time.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path, help="file with a prompt on each line")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--deadline", type=float, help="seconds that an answer may take")
    given = parser.parse_args(arguments)

    model = load(given.bundle, threads=1)
    cancel = threading.Event()
    with given.prompts.open(encoding="utf-8") as file:
        prompts = (line for line in map(str.strip, file) if line)
        try:
            for answer in answers(
                model, prompts, workers=given.workers, cancel=cancel, max_new_tokens=given.max_new_tokens,
                deadline=given.deadline,
            ):  # fmt: skip
                print(" ".join(answer.text.split()), flush=True)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
