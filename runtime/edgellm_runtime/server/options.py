"""What a server is asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from edgellm_runtime.arguments import check_flag, check_integer, check_list, check_number, check_text
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.errors import OptionError

__all__ = ["ServerOptions", "is_loopback"]

_LEAST_KEY = 8  # characters


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Who may ask a server, for how much.

    Args:
        host: the address to listen at.
        port: likewise; 0: any that is free.
        api_keys: of which a caller must name one; none: anyone may call.
        open_to_all: whether no key is wanted though others can reach the address.
        allow_hosts: names that callers on this machine may call it by, besides the loopback ones.
        allow_origins: web pages that may call it, such as ``https://example.org``, besides its own.
        max_body: bytes of a request.
        rate: requests a minute of a caller; 0: any number.
        timeout: seconds after which a request is ended; None: none.
        drain: seconds that requests have to end once the server is told to.
        batch: how each model's requests share it.
        log_contents: whether the log has what was asked and answered.

    Raises:
        OptionError: a value is outside its range, or others could call without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    open_to_all: bool = False
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    max_body: int = 4 * 2**20
    rate: int = 0
    timeout: float | None = None
    drain: float = 30.0
    batch: BatchOptions = field(default_factory=BatchOptions)
    log_contents: bool = False

    def __post_init__(self) -> None:
        check_text("host", self.host)
        check_integer("port", self.port, 0, 65535)
        check_list("api_keys", self.api_keys, "texts", _check_key)
        check_flag("open_to_all", self.open_to_all)
        check_list("allow_hosts", self.allow_hosts, "names", check_text)
        check_list("allow_origins", self.allow_origins, "origins", check_text)
        check_integer("max_body", self.max_body, 1024, 2**31)
        check_integer("rate", self.rate, 0, 2**31)
        if self.timeout is not None:
            check_number("timeout", self.timeout, 0, 1e9, open_low=True)
        check_number("drain", self.drain, 0, 1e9)
        if not (is_loopback(self.host) or self.api_keys or self.open_to_all):
            raise OptionError(
                f"host is {self.host!r}, which others can reach, and there is no API key; name one in EDGELLM_API_KEY, "
                "or say --open to let anyone call"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_key(name: str, value: object) -> str:
    key = check_text(name, value)
    if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise OptionError(f"{name} has {len(key)} characters; a key has at least {_LEAST_KEY}, of ASCII, and no space")
    return key
