"""``edgellm sign``: say whose a bundle is."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["sign"]

_PASSWORD = "EDGELLM_KEY_PASSWORD"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="Private key of an elliptic curve, in PEM; EDGELLM_KEY_PASSWORD has its password.")  # fmt: skip
def sign(bundle: Path, key: Path) -> None:
    """Sign BUNDLE with a private key; the signature lies beside its files as model.sig.

    It covers every file, and that there are no others. A bundle that is exported or built anew is signed anew. Keys are
    made with OpenSSL; docs/security.md says how. Needs model-signing (extra sign).
    """
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.bundle.signature import sign as write

    Bundle(bundle)  # what is damaged is not signed
    signature = write(bundle, key, password=os.environ.get(_PASSWORD))
    click.echo(f"{signature}: signed; edgellm verify {bundle} --key PUBLIC_KEY holds it to that")
