"""Serving until told to end: then no new request is taken, and those that run are answered first."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable

import uvicorn

from edgellm_runtime.errors import OptionError
from edgellm_runtime.server.app import application
from edgellm_runtime.server.host import Host
from edgellm_runtime.server.options import ServerOptions

__all__ = ["listen", "log_to_stderr", "serve", "server_of"]

_CONNECTIONS = 1000
_IDLE_S = 30


def serve(host: Host, options: ServerOptions, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends at once.

    Args:
        host: the models.
        options: of the server.
        ready: is told the address.

    Raises:
        OptionError: the address cannot be had.
    """
    with listen(options) as sock:
        name, port = sock.getsockname()[:2]
        ready(f"http://{f'[{name}]' if ':' in name else name}:{port}")
        try:
            server_of(host, options).run(sockets=[sock])
        except KeyboardInterrupt:  # uvicorn raises the signal again, after it has ended as it should
            pass
        finally:
            host.close()


def server_of(host: Host, options: ServerOptions) -> uvicorn.Server:
    """A server that is not running yet."""
    config = uvicorn.Config(
        application(host, options), http="h11", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, limit_concurrency=_CONNECTIONS, timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=max(int(options.drain), 1), h11_max_incomplete_event_size=64 * 1024,
    )  # fmt: skip
    return uvicorn.Server(config)


def listen(options: ServerOptions) -> socket.socket:
    """A socket at the server's address.

    Raises:
        OptionError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((options.host, options.port))
        sock.listen()  # whoever comes once the address has been told waits, and is not refused
    except OSError as error:
        sock.close()
        raise OptionError(
            f"cannot listen at {options.host}, port {options.port} ({error.strerror or error}); name another"
        ) from error
    return sock


def log_to_stderr() -> None:
    """Write requests' lines, and what goes wrong, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("edgellm", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level)
