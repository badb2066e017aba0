"""``edgellm generate``: one answer to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgellm.cli.defaults import choosing_options, given, own, unnamed
from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import print_json, read_input, unescaped
from edgellm.cli.threads import threads_option
from edgellm_runtime.errors import OptionError

if TYPE_CHECKING:
    from edgellm_runtime.generation.generate import Generation, OptionKeywords
    from edgellm_runtime.model import Model

__all__ = ["generate"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("--chat/--raw", "chat", default=None, help="Send PROMPT as a user's message, or as plain text to go on "
              "from.  [default: chat if the bundle has a chat template]", show_default=False)  # fmt: skip
@click.option("--system", default=None, help="System message, in chat mode.  [default: the template's own]")
@click.option("--special", is_flag=True, help="Read names of special tokens in a raw PROMPT as those tokens.")
@choosing_options(max_new_tokens=256)
@click.option("--presence-penalty", type=float, default=0.0, help="Above 0 discourages tokens that the answer has.")
@click.option("--frequency-penalty", type=float, default=0.0, help="Likewise, for each time that it has them.")
@click.option("--no-repeat-ngram", type=int, default=None, help=f"Let no run of so many tokens come twice; 0 lets all "
              f"come.  {own(0)}")  # fmt: skip
@click.option("--seed", type=int, default=None, help="Makes sampling repeatable.  [default: random]")
@click.option("--stop", multiple=True, help="End the answer before this text, in which \\n, \\t and \\\\ stand "
              "for a line break, a tab and a backslash; may be given several times.  "
              "[default: the bundle's]")  # fmt: skip
@click.option("--stop-token", "stop_tokens", type=int, multiple=True, help="End the answer at the token of this id; "
              "may be given several times.")  # fmt: skip
@click.option("--min-tokens", type=int, default=None, help=f"Choose no end token or stop token before so many.  "
              f"{own(0)}")  # fmt: skip
@click.option("--logprobs", type=int, default=None, help="With --json: each token's log-probability, and so many "
              "of the most probable tokens with theirs.")  # fmt: skip
@click.option("--json-schema", type=click.Path(path_type=Path), default=None, metavar="FILE", help="The answer is JSON "
              "that this schema holds for (extra grammar).")  # fmt: skip
@click.option("--regex", default=None, help="The answer matches this, whole.")
@click.option("--lark", type=click.Path(path_type=Path), default=None, metavar="FILE",
              help="The answer is of this grammar.")  # fmt: skip
@click.option("--choice", "choices", multiple=True, help="The answer is this or another --choice.")
@click.option("--draft", type=click.Choice(["lookup", "recurrent", "combined"]), default=None, help="Propose tokens "
              "that the model checks several at a time: what followed the same words before, what the bundle's drafter "
              "foretells, or the first where there is such and else the second.  "
              "[default: none]", show_default=False)  # fmt: skip
@click.option("--adapter", default=None, metavar="NAME", help="Answer with this adapter of the bundle's.  "
              "[default: none]")  # fmt: skip
@threads_option
@device_option
@click.option("--ignore-eos", is_flag=True, help="Go on past end tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def generate(
    bundle: str, prompt: str, chat: bool | None, system: str | None, special: bool, max_new_tokens: int | None,
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None,
    repetition_penalty: float | None, presence_penalty: float, frequency_penalty: float, no_repeat_ngram: int | None,
    seed: int | None, stop: tuple[str, ...], stop_tokens: tuple[int, ...], min_tokens: int | None,
    logprobs: int | None, json_schema: Path | None, regex: str | None, lark: Path | None, choices: tuple[str, ...],
    draft: str | None, adapter: str | None, threads: int | None, device: str, ignore_eos: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer PROMPT with the model in BUNDLE. A PROMPT of - is read from standard input, without its last line break.

    The answer streams to standard output, a line about its speed to standard error.
    """
    from edgellm_runtime import load

    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are numbers for a program; add --json.")
    text = read_input() if prompt == "-" else prompt
    model = load(bundle, device=device, threads=threads).with_adapter(adapter)
    options: OptionKeywords = given({
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": [unescaped(text) for text in stop] or None,
        "ignore_eos": ignore_eos, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
        "no_repeat_ngram": no_repeat_ngram, "stop_tokens": stop_tokens, "min_tokens": min_tokens, "logprobs": logprobs,
        "draft": draft,
    })  # fmt: skip
    form = given({
        "json_schema": _contents(json_schema), "regex": regex, "lark": _contents(lark),
        "choices": list(choices) or None,
    })  # fmt: skip
    if form:
        options["grammar"] = model.grammar(**form)
    ready = _prompt(model, text, chat=chat, system=system, special=special)
    if as_json:
        print_json(model.generate(ready, **options).to_json())
        return
    stream = model.stream(ready, **options)
    for chunk in stream:
        click.echo(chunk.text, nl=False)
    click.echo()
    if stream.generation:
        own_options = unnamed(model.generation_defaults, options)
        click.secho(f"{summary(stream.generation)}, on {model.device}{own_options}", err=True, dim=True)


def _contents(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read ({error}); name a file of text") from error


def _prompt(model: Model, text: str, *, chat: bool | None, system: str | None, special: bool) -> str | list[int]:
    """What the model should go on from."""
    if chat is None:
        chat = model.has_chat_template
    if not chat:
        if system is not None:
            raise click.UsageError("--system belongs to chat mode; leave out --raw, or write it into the prompt.")
        if special and model.tokenizer is not None:
            tokens = model.tokenizer.encode(text, bos=model.tokenizer.add_bos, special=True)
            return [*tokens, *model.tokenizer.source_end]
        return text
    if special:
        raise click.UsageError("--special is for --raw prompts; a chat template writes its own special tokens.")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.chat_template.encode(messages)


def summary(answer: Generation) -> str:
    """One line about an answer's size and speed."""
    t = answer.timings
    drafts = answer.speculation
    found = "" if drafts is None else f", {drafts.accepted} of {drafts.drafted} drafted tokens right"
    return (
        f"{answer.prompt_tokens} prompt + {len(answer.tokens)} new tokens, {answer.finish_reason}; first token "
        f"{t.ttft_ms:.0f} ms, prompt {t.prefill_tokens_per_s:.0f} tok/s, then {t.decode_tokens_per_s:.1f} tok/s{found}"
    )
