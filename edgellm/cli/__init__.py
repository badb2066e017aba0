"""The command line: ``edgellm COMMAND``. Each command's module loads when it is called, heavy libraries inside it.

Only here do errors become exit codes: 1 for a fault that was explained, 2 for wrong usage, 130 for Ctrl-C
and for SIGTERM.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys

import click

from edgellm.cli.standard_streams import tolerate

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS = {
    "demo": "Train, export, verify, run and time a small model, then a real one.",
    "train": "Train a language model on text files.",
    "export": "Turn a checkpoint into a bundle that runs without PyTorch.",
    "build": "Build the engines of a bundle for this device's GPU.",
    "verify": "Check that a bundle still computes what PyTorch computed.",
    "diff": "Find the first layer and step at which a bundle parts from another model.",
    "sign": "Sign a bundle, so that others can know whose it is.",
    "generate": "Go on from a prompt, or answer it.",
    "chat": "Talk to a model.",
    "embed": "Print texts as vectors.",
    "serve": "Serve bundles over HTTP, with OpenAI's and Anthropic's interfaces.",
    "bench": "Measure a bundle's speed and memory on this device.",
    "profile": "Tell where a bundle's time goes, by operator and by layer.",
    "eval": "Measure how well a bundle predicts a text, or does its task.",
    "inspect": "Show what a bundle holds.",
    "doctor": "Find what is wrong, or slow, on this machine.",
    "models": "List the models that can be exported, and how each is read.",
}


class _Commands(click.Group):
    """Knows the names of its commands and imports one when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"edgellm.cli.{cmd_name}"), _attribute(cmd_name))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the table above, so that --help imports nothing
            formatter.write_dl(list(COMMANDS.items()))


def _attribute(command: str) -> str:
    return {"eval": "evaluate"}.get(command, command)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgellm")
def cli() -> None:
    """Take a PyTorch language model to the device: train, export, quantize, prove, run, measure."""


_RUNNING = ("generate", "chat", "embed", "serve", "bench", "verify", "eval", "profile")  # load bundles, and no PyTorch
_BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"


def main() -> None:
    """Run the command line and exit with its status."""
    _end_like_ctrl_c()
    tolerate()
    _let_blas_rest(sys.argv[1:])
    status = run(sys.argv[1:])
    gc.freeze()  # what is left goes with the process: looking through it takes a second after an export
    sys.exit(status)


def _end_like_ctrl_c() -> None:
    """Let a request to end undo what is half done, as Ctrl-C does; by default it leaves scratch folders behind."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, signal.default_int_handler)


def _let_blas_rest(arguments: list[str]) -> None:
    """Have NumPy's threads sleep after 2^4 looks for work, not after 2^26: for 0.1 s after its import they would take
    the cores that a bundle is loaded with. This is for the process of a command; in others' processes it is theirs.
    """
    if arguments[:1] and arguments[0] in _RUNNING:
        os.environ.setdefault(_BLAS_WAIT, "4")


def run(arguments: list[str]) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name.

    Returns:
        The exit status.
    """
    from edgellm.errors import ModelError
    from edgellm_exporters.errors import ExportError
    from edgellm_runtime.errors import RuntimeFault

    try:
        status = cli.main(args=arguments, prog_name="edgellm", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except (ModelError, ExportError, RuntimeFault) as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader of our output has gone, such as `| head`
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        return _fail(_missing(error, arguments[0] if arguments else ""), 1)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(" ".join(message.split()), err=True)
    return status


def _missing(error: ModuleNotFoundError, command: str) -> str:
    extras = {"torch": "export", "onnx": "export", "onnx_ir": "export", "onnxscript": "export", "gguf": "export",
              "safetensors": "export", "matplotlib": "train",
              "starlette": "serve", "uvicorn": "serve",
              "sacrebleu": "tasks", "rouge_score": "tasks", "seqeval": "tasks"}  # fmt: skip
    extra = extras.get((error.name or "").split(".")[0])
    if extra is None:
        raise error
    if command == "train" and extra == "export":  # which asks for less
        extra = "train"
    return f"{error.name} is not installed and this command needs it; in a clone of edgellm: pip install '.[{extra}]'"
