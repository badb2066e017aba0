"""Signed bundles: who made one, proved by a key; in OpenSSF's format for models, by its own library.

A signature covers every file of the bundle, and that there are no others. It lies beside them as ``model.sig``. With a
policy, of trusted keys, nothing of a bundle is looked at before its signature holds; without the library, or without a
signature, there is no such bundle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm_runtime.arguments import check_list, check_path
from edgellm_runtime.errors import BundleError, OptionError, first_line

__all__ = ["SIGNATURE", "VARIABLE", "check_signature", "policy", "sign"]

SIGNATURE = "model.sig"
VARIABLE = "EDGELLM_TRUSTED_KEYS"
_MOST_BYTES, _MOST_KEY = 1 << 20, 1 << 16


def policy(keys: Sequence[str | Path] | None = None) -> list[Path] | None:
    """The public keys of which one must have signed a bundle; None: any bundle is taken.

    Args:
        keys: files; None for what ``EDGELLM_TRUSTED_KEYS`` names, with the system's separator between them.

    Raises:
        OptionError: something that is no list of paths, or an empty one, which would trust nobody.
    """
    if keys is None:
        named = os.environ.get(VARIABLE)
        if named is None:
            return None
        found = [Path(part) for part in named.split(os.pathsep) if part]
        said = VARIABLE
    else:
        found = [Path(key) for key in check_list("trusted_keys", keys, "files", check_path)]
        said = "trusted_keys"
    if not found:
        raise OptionError(f"{said} names no key, so that no bundle would be trusted; name the file of a public key")
    return found


def sign(bundle: Path, private_key: Path, *, password: str | None = None) -> Path:
    """Sign a bundle, over any signature that it has.

    Args:
        bundle: its directory.
        private_key: a PEM file of an elliptic curve's key (P-256, P-384 or P-521).
        password: of that file, if it has one.

    Returns:
        The signature's file.

    Raises:
        OptionError: the library is missing, or the key is none.
        BundleError: the signature cannot be written.
    """
    library, signature = _library(), bundle / SIGNATURE
    _check_key(private_key)
    scratch = bundle / f".{SIGNATURE}"
    config = library.signing.Config().set_hashing_config(_hashing(library, signature, scratch))
    try:
        try:
            # the library hands it on as it is, to one that wants bytes
            secret: Any = None if password is None else password.encode()
            signer = config.use_elliptic_key_signer(private_key=private_key, password=secret)
        except Exception as error:  # the library raises many kinds
            raise OptionError(
                f"{private_key}: is no private key that signs ({first_line(error)}); name another"
            ) from error
        signer.sign(bundle, scratch)
        scratch.replace(signature)
    except OSError as error:
        raise BundleError(f"{bundle}: no signature can be written ({error.strerror or error}); make room") from error
    finally:
        scratch.unlink(missing_ok=True)
    return signature


def check_signature(bundle: Path, keys: Sequence[Path]) -> Path:
    """Make sure that one of some keys signed all that a bundle holds.

    Args:
        bundle: its directory.
        keys: PEM files of public keys.

    Returns:
        The key that did.

    Raises:
        OptionError: the library is missing, or a key is none.
        BundleError: there is no signature, it is of no such key, or a file was changed, added or taken away since.
    """
    library, signature = _library(), bundle / SIGNATURE
    for key in keys:
        _check_key(key)
    if not bundle.is_dir():
        raise BundleError(f"{bundle}: is no directory; a bundle is the directory that 'edgellm export' wrote")
    try:
        if signature.is_symlink() or not signature.is_file() or signature.stat().st_size > _MOST_BYTES:
            raise BundleError(
                f"{bundle}: is not signed, and only signed bundles are trusted here; edgellm sign signs one"
            )
    except OSError as error:
        raise BundleError(f"{signature}: cannot be read ({error.strerror}); copy the bundle again") from error
    said: list[str] = []
    for key in keys:
        try:
            config = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
        except Exception as error:  # the library raises many kinds
            raise OptionError(f"{key}: is no public key ({first_line(error)}); name another") from error
        try:
            config.set_hashing_config(_hashing(library, signature)).verify(bundle, signature)
        except Exception as error:  # whatever it says, it does not hold
            said.append(f"{key.name}: {first_line(error)[:160]}")
        else:
            return key
    raise BundleError(f"{bundle}: its signature does not hold ({'; '.join(said)}); get it from who signed it")


def _hashing(library: Any, *signatures: Path) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=list(signatures), ignore_git_paths=False)


def _check_key(key: Path) -> None:
    try:
        if key.stat().st_size > _MOST_KEY:
            raise OptionError(f"{key}: is too large to be a key; name another")
        with key.open("rb"):
            pass
    except OSError as error:
        raise OptionError(f"{key}: cannot be read ({error.strerror}); name the file of a key") from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise OptionError(
            f"signatures need model-signing ({error}); pip install 'model-signing>=1.1,<2' pyOpenSSL"
        ) from error
    return model_signing
