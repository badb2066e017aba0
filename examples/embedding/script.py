"""Ask a text questions. It is read once: each answer goes on from there, and so does the next start.

python examples/embedding/script.py BUNDLE TEXT "When was it?" "Who was there?" --states runs/states
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgellm_runtime import Generation, Model, StateError, TextState, load

__all__ = ["answers", "main", "read_once"]


def read_once(model: Model, text: str, states: Path | None) -> TextState:
    """The state of a model that has read a text, from the folder if it is there, else read and put there.

    Args:
        model: reads it.
        text: what is asked about.
        states: where states are kept, each under a digest of its text; None: nowhere.
    """
    if states is None:
        return model.read(text)
    path = states / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.state"
    try:
        return model.load_state(path)
    except StateError:  # there is none, or it is another model's: the text is read, again or for the first time
        state = model.read(text)
        states.mkdir(parents=True, exist_ok=True)
        state.save(path)
        return state


def answers(model: Model, state: TextState, questions: Sequence[str], max_new_tokens: int = 64) -> Iterator[Generation]:
    """An answer to each question, of one line; none of them knows of the others.

    Args:
        model: answers.
        state: of the text; it stays as it is.
        questions: about it.
        max_new_tokens: of an answer.
    """
    for question in questions:
        prompt = f"\n\nQuestion: {question}\nAnswer:"
        yield model.generate(prompt, state=state, stop="\n", max_new_tokens=max_new_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a text questions; it is read once.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path, help="file with the text")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--states", type=Path, help="folder that keeps what was read for the next start")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    given = parser.parse_args(arguments)

    model = load(given.bundle)
    state = read_once(model, given.text.read_text(encoding="utf-8"), given.states)
    for question, answer in zip(
        given.questions, answers(model, state, given.questions, given.max_new_tokens), strict=True
    ):
        print(f"{question}\n  {answer.text.strip()}")


if __name__ == "__main__":
    main()
