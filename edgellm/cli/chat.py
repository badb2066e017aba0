"""``edgellm chat``: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import click

from edgellm.cli.defaults import choosing_options, given
from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import input_is_terminal, read_lines
from edgellm.cli.threads import threads_option

if TYPE_CHECKING:
    from edgellm_runtime.generation.conversation import Conversation
    from edgellm_runtime.generation.generate import OptionKeywords

__all__ = ["chat"]

_COMMAND = re.compile(r"/[a-z]+(\s|$)")
_MOST_NEW = 512
_WITHOUT = "-"  # in an adapter's place; no adapter has such a name
_HELP = """\
/reset          forget the conversation
/system [TEXT]  show or set the system message; setting it forgets the conversation
/adapter [NAME] show or choose the adapter that answers, - for none; the conversation stays and is read anew
/stats          sizes and speed of the last answer
/help           this
//TEXT          send a message that begins with /
/exit           leave; so does end of file"""


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path())
@click.option("--system", default=None, help="System message.  [default: the template's own]")
@choosing_options(max_new_tokens=_MOST_NEW)
@click.option("--seed", type=int, default=None, help="Makes sampling repeatable.  [default: random]")
@click.option("--adapter", default=None, metavar="NAME", help="Begin with this adapter of the bundle's.  "
              "[default: none]")  # fmt: skip
@threads_option
@device_option
def chat(
    bundle: str, system: str | None, max_new_tokens: int | None, temperature: float | None, top_k: int | None,
    top_p: float | None, min_p: float | None, repetition_penalty: float | None, seed: int | None,
    adapter: str | None, threads: int | None, device: str,
) -> None:  # fmt: skip
    """Talk with the model in BUNDLE. /help lists the commands; Ctrl-C stops an answer.

    Each line of standard input is a message, so a script can be piped in. A line that begins with // is a message that
    begins with /.
    """
    from edgellm_runtime import load
    from edgellm_runtime.generation.generate import GenerationOptions

    options: OptionKeywords = given({
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    })  # fmt: skip
    GenerationOptions(**options)  # a wrong option is told before the model is loaded
    model = load(bundle, device=device, threads=threads).with_adapter(adapter)
    if "max_new_tokens" not in model.generation_defaults:
        options.setdefault("max_new_tokens", _MOST_NEW)
    conversation = model.conversation(system=system)
    tty = input_is_terminal()
    if tty:
        click.secho("/help lists the commands.", err=True, dim=True)
    _loop(conversation, model.adapters, options, _line_reader(tty))


def _loop(
    conversation: Conversation, adapters: Sequence[str], options: OptionKeywords, read: Callable[[], str | None]
) -> None:
    interrupted = False
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            click.echo(err=True)
            if interrupted:
                return
            interrupted = True
            click.secho("Ctrl-C again, or /exit, to leave.", err=True, dim=True)
            continue
        interrupted = False
        if line is None or line.strip() == "/exit":
            return
        if _COMMAND.match(line):
            _command(conversation, adapters, line.strip())
        elif line.strip():
            _answer(conversation, line[1:] if line.startswith("//") else line, options)


def _line_reader(tty: bool) -> Callable[[], str | None]:
    """Reads a line without its end, or None at the end of file."""
    if not tty:
        lines = read_lines()
        return lambda: next(lines, None)
    with suppress(ImportError):  # Windows has no such module
        import readline  # noqa: F401  gives input() history and editing

    def read() -> str | None:
        try:
            return input("> ")
        except EOFError:
            click.echo(err=True)
            return None

    return read


def _answer(conversation: Conversation, text: str, options: OptionKeywords) -> None:
    from edgellm_runtime.errors import ContextError, OptionError

    try:
        with closing(conversation.stream(text, **options)) as chunks:
            for chunk in chunks:
                click.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        click.secho(" [stopped]", err=True, dim=True, nl=False)
    except (ContextError, OptionError) as e:  # this message cannot be answered; the next one may
        click.secho(f"{e}; /reset begins anew", err=True, fg="red", nl=False)
    click.echo()


def _command(conversation: Conversation, adapters: Sequence[str], line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        note = "The conversation is forgotten."
    elif name == "/system" and rest.strip():
        conversation.reset(system=rest.strip())
        note = "The system message is set; the conversation is forgotten."
    elif name == "/system":
        note = conversation.system if conversation.system is not None else "No system message but the template's own."
    elif name == "/adapter":
        note = _adapter(conversation, adapters, rest.strip())
    elif name == "/stats":
        note = _stats(conversation)
    elif name == "/help":
        note = _HELP
    else:
        note = f"No command {name}; /help lists them. Begin a message with // to send it with one /."
    click.secho(note, err=True, dim=True)


def _adapter(conversation: Conversation, adapters: Sequence[str], wanted: str) -> str:
    from edgellm_runtime.errors import OptionError

    if not wanted:
        named = [f"* {name}" if name == conversation.adapter else f"  {name}" for name in adapters]
        return "\n".join([*named, f"{'*' if conversation.adapter is None else ' '} {_WITHOUT} (none)"])
    try:
        conversation.switch(None if wanted == _WITHOUT else wanted)
    except OptionError as error:
        return str(error)
    if conversation.adapter is None:
        return "Answers come from the model without an adapter; it reads the conversation anew."
    return f"Answers come with the adapter {conversation.adapter}; it reads the conversation anew."


def _stats(conversation: Conversation) -> str:
    from edgellm.cli.generate import summary

    if conversation.last is None:
        return "No answer yet."
    return (
        f"{summary(conversation.last)}\n{conversation.reused_tokens} prompt tokens were not read again; the state "
        f"holds {conversation.held_tokens} tokens in {conversation.state_bytes / 1e6:.1f} MB"
    )
