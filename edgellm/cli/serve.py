"""``edgellm serve``: bundles over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from edgellm.cli.device import device_option
from edgellm.cli.threads import threads_option

__all__ = ["serve"]


@click.command(context_settings={"show_default": True})
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--host", default="127.0.0.1", help="Address to listen at; others than loopback ones need an API key.")
@click.option("--port", type=int, default=8000, help="Port to listen at; 0 is any that is free.")
@click.option("--api-key", "api_keys", multiple=True, envvar="EDGELLM_API_KEY", show_envvar=True, show_default=False,
              help="A key, of which callers must send one; repeatable. Other users of the machine can see what stands "
                   "on the command line, but not the variable.")  # fmt: skip
@click.option("--open", "open_to_all", is_flag=True, help="Let anyone call who can reach the address, without a key.")
@click.option("--rows", type=int, default=8, help="Answers of each bundle that are made at once.")
@click.option("--queue", type=int, default=64, help="Requests of each bundle that may wait; further ones are refused.")
@click.option("--piece", type=int, default=None, show_default=False, help="Tokens of a prompt that are read between "
              "two tokens of the other answers.  [default: as many as of a prompt alone]")  # fmt: skip
@click.option("--exact", is_flag=True, help="Give each answer the very bits that it has alone; several times slower.")
@click.option("--max-memory", type=int, default=None, show_default=False, help="Bytes that weights and states of all "
              "bundles may take, as predicted; contexts are shortened to it.  [default: no limit]")  # fmt: skip
@click.option("--prefix-cache", type=int, default=None, show_default=False, help="Bytes, among those, for what prompts "
              "begin with, which is then read once; 0 keeps nothing.  [default: 256 MiB, or a quarter of what weights "
              "leave of --max-memory]")  # fmt: skip
@click.option("--max-body", type=int, default=4 * 2**20, help="Bytes of a request.")
@click.option("--rate", type=int, default=0, help="Requests a minute of a caller; 0 is any number.")
@click.option("--timeout", type=float, default=None, show_default=False, help="Seconds after which a request is ended."
              "  [default: none]")  # fmt: skip
@click.option("--drain", type=float, default=30.0, help="Seconds that requests have to end after SIGTERM or Ctrl-C.")
@click.option("--allow-host", "allow_hosts", multiple=True, show_default=False, help="A name that this machine's "
              "callers may use besides localhost; repeatable.")  # fmt: skip
@click.option("--allow-origin", "allow_origins", multiple=True, show_default=False, help="A web page's origin that may "
              "call, such as https://example.org; repeatable.")  # fmt: skip
@click.option("--log-contents", is_flag=True, help="Log what is asked and answered too.")
@threads_option
@device_option
def serve(
    bundles: tuple[str, ...], host: str, port: int, api_keys: tuple[str, ...], open_to_all: bool, rows: int, queue: int,
    piece: int | None, exact: bool, max_memory: int | None, prefix_cache: int | None, max_body: int, rate: int,
    timeout: float | None, drain: float, allow_hosts: tuple[str, ...], allow_origins: tuple[str, ...],
    log_contents: bool, threads: int | None, device: str,
) -> None:  # fmt: skip
    """Serve each BUNDLE over HTTP, with the interfaces of OpenAI and Anthropic, and a page to chat at /.

    A bundle is called what its folder is called; NAME=BUNDLE gives it another name. Requests of a bundle run together.
    Each is logged on standard error as one line of JSON. SIGTERM and Ctrl-C end the server when what runs has been
    answered.
    """
    from edgellm_runtime.batching.options import BatchOptions
    from edgellm_runtime.server.options import ServerOptions

    batch = BatchOptions(rows=rows, queue=queue, piece=piece, exact=exact)
    options = ServerOptions(
        host=host, port=port, api_keys=api_keys, open_to_all=open_to_all, allow_hosts=allow_hosts,
        allow_origins=allow_origins, max_body=max_body, rate=rate, timeout=timeout, drain=drain, batch=batch,
        log_contents=log_contents,
    )  # fmt: skip
    named = _named(bundles)
    from edgellm_runtime.server import run
    from edgellm_runtime.server.host import open_host

    run.log_to_stderr()
    opened = open_host(named, batch, device=device, threads=threads, max_memory=max_memory, prefix_cache=prefix_cache)
    for hosted in opened:
        context = hosted.scheduler.context
        shortened = "" if context == hosted.model.session.max_context else ", shortened to --max-memory"
        click.secho(f"{hosted.name}: context {context:,} tokens{shortened}", err=True, dim=True)
    run.serve(opened, options, lambda address: click.secho(f"Serving at {address}", err=True, bold=True))


def _named(bundles: tuple[str, ...]) -> dict[str, Path]:
    """Paths by names: what stands before ``=``, else the folder's."""
    found: dict[str, Path] = {}
    for bundle in bundles:
        name, equals, path = bundle.partition("=")
        if not equals or "/" in name:
            name, path = Path(bundle).absolute().name, bundle
        if not name or name in found:
            raise click.UsageError(f"{bundle}: two bundles are called {name!r}; write NAME={bundle}")
        found[name] = Path(path)
    return found
