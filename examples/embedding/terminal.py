"""A chat in the terminal whose turns can be taken back, said otherwise and forked.

    python examples/embedding/terminal.py BUNDLE

What a branch has in common with another is read once, and a turn that is said otherwise is read from where it parts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from edgellm_runtime import Conversation, Model, RuntimeFault, load

__all__ = ["Terminal", "main"]

_HELP = """\
/fork NAME      go on in a copy of this conversation
/branches       all of them
/go NAME        to another one
/rewind [N]     take the last turn back, or the last N
/edit N TEXT    say this instead in turn N; what came after is forgotten
/correct TEXT   put this in the place of the model's last answer
/again          another answer to the last message
/show           what was said
/save FILE      this conversation and its state, for /load FILE here or at another start
/exit           leave; so does the end of input. Ctrl-C ends an answer."""


class Terminal:
    """Conversations by name, one of which goes on.

    Args:
        model: answers.
        out: where to write.
        max_new_tokens: of an answer.
        temperature: of its tokens.
        seed: of the first answer; each further one has the next.
    """

    def __init__(
        self, model: Model, out: TextIO, *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self._model, self._out = model, out
        self._max_new_tokens, self._temperature, self._seeds = max_new_tokens, temperature, itertools.count(seed)
        self.branches: dict[str, Conversation] = {"main": model.conversation()}
        self.name = "main"

    @property
    def conversation(self) -> Conversation:
        """The one that goes on."""
        return self.branches[self.name]

    def enter(self, line: str) -> bool:
        """Carry out a line that was typed: a command, or a message to the model; False: leave."""
        name, _, rest = line.strip().partition(" ")
        if name == "/exit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/fork": self._fork, "/branches": self._list, "/go": self._go, "/rewind": self._rewind, "/edit": self._edit,
            "/correct": self._correct, "/again": self._again, "/show": self._show, "/save": self._save,
            "/load": self._load,
        }  # fmt: skip
        try:
            if name.startswith("/"):
                commands.get(name, lambda rest: self._note(_HELP))(rest.strip())
            elif line.strip():
                self._say(line)
        except (RuntimeFault, ValueError) as error:  # the conversation is what it was
            self._note(str(error))
        return True

    def _say(self, text: str) -> None:
        """Answer a message, token by token; what Ctrl-C leaves of the answer stays in the conversation."""
        stream = self.conversation.stream(
            text, max_new_tokens=self._max_new_tokens, temperature=self._temperature, seed=next(self._seeds)
        )
        with contextlib.closing(stream):
            try:
                for chunk in stream:
                    print(chunk.text, end="", file=self._out, flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=self._out)
        print(file=self._out)
        talk = self.conversation
        self._note(f"{self.name}: {talk.reused_tokens} tokens were not read again, {talk.held_tokens} are held")

    def _say_instead(self, turns: int, text: str) -> None:
        """Take turns back and say something else; if that cannot be answered, they are as they were."""
        before = self.conversation.messages
        self.conversation.rewind(turns)
        try:
            self._say(text)
        except RuntimeFault:
            self.conversation.edit(before)
            raise

    def _fork(self, name: str) -> None:
        if not name or name in self.branches:
            raise ValueError(f"a fork wants a name of its own; taken are {', '.join(self.branches)}")
        self.branches[name] = self.conversation.fork()
        self._go(name)

    def _go(self, name: str) -> None:
        if name not in self.branches:
            raise ValueError(f"no branch {name!r}; there are {', '.join(self.branches)}")
        self.name = name
        self._note(f"in {name}")

    def _list(self, rest: str) -> None:
        for name, talk in self.branches.items():
            self._note(f"{'*' if name == self.name else ' '} {name}: {talk!r}")

    def _rewind(self, rest: str) -> None:
        self.conversation.rewind(_number(rest or "1"))
        self._show("")

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        turn, turns = _number(number), len(self._asked())
        if not 1 <= turn <= turns or not text:
            raise ValueError(f"/edit N TEXT, with N from 1 to {turns}")
        self._say_instead(turns - turn + 1, text)

    def _correct(self, text: str) -> None:
        messages = self.conversation.messages
        if not text or not messages or messages[-1]["role"] != "assistant":
            raise ValueError("/correct TEXT, after an answer")
        self.conversation.edit([*messages[:-1], {"role": "assistant", "content": text}])

    def _again(self, rest: str) -> None:
        if not (asked := self._asked()):
            raise ValueError("nothing was asked yet")
        self._say_instead(1, asked[-1])

    def _show(self, rest: str) -> None:
        for message in self.conversation.messages:
            self._note(f"{message['role']}: {message['content']}")

    def _save(self, rest: str) -> None:
        self.conversation.save(rest)

    def _load(self, rest: str) -> None:
        self.branches[self.name] = self._model.load_conversation(rest)
        self._show("")

    def _asked(self) -> list[str]:
        return [message["content"] for message in self.conversation.messages if message["role"] == "user"]

    def _note(self, text: str) -> None:
        print(f"\033[2m{text}\033[0m" if self._out.isatty() else text, file=self._out)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no number of turns")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Talk with a model; turns can be taken back, changed and forked.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with contextlib.suppress(ImportError):  # Windows has no such module
        import readline  # noqa: F401  gives input() history and editing

    terminal = Terminal(
        load(given.bundle), sys.stdout, max_new_tokens=given.max_new_tokens, temperature=given.temperature,
        seed=given.seed,
    )  # fmt: skip
    print(_HELP)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while terminal.enter(input(f"{terminal.name}> ")):
            pass


if __name__ == "__main__":
    main()
