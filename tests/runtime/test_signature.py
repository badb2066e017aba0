"""Signed bundles: what a trusted key signed is loaded, and nothing else is, once there is a policy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from tiny_bundles import attention_bundle
from tiny_files import copied, edit_manifest
from tiny_files import sign as rewrite_checksums

from edgellm.cli import run
from edgellm_exporters.atomic import check_destination
from edgellm_exporters.errors import ExportError
from edgellm_runtime import BundleError, OptionError, load, open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.bundle.signature import SIGNATURE, VARIABLE, sign


def write_keys(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    hidden = forms.BestAvailableEncryption(password) if password else forms.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, hidden))
    public.write_bytes(key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_keys(folder, name) for name in ("ours", "another")}


@pytest.fixture
def bundle(tmp_path: Path, keys: dict[str, tuple[Path, Path]]) -> Path:
    folder = copied(attention_bundle(), tmp_path)
    sign(folder, keys["ours"][0])
    return folder


def test_what_a_trusted_key_signed_loads_wherever_it_lies(bundle: Path, keys: dict, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "elsewhere")
    assert load(moved, trusted_keys=[keys["another"][1], keys["ours"][1]]).generate("the", max_new_tokens=2).tokens
    assert load(moved).bundle  # and where there is no policy, any bundle does


def flip(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    rewrite_checksums(bundle, "model.onnx.data")


def cut(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes((bundle / SIGNATURE).read_bytes()[:-40])


def link(bundle: Path) -> None:
    (bundle / SIGNATURE).rename(bundle.parent / "aside")
    (bundle / SIGNATURE).symlink_to("../aside")


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight, with its checksum": (flip, "its signature does not hold"),
    "the manifest": (lambda b: edit_manifest(b, max_context=40), "its signature does not hold"),
    "a file more": (lambda b: (b / "decode.engine").write_bytes(b"x"), "its signature does not hold"),
    "a file less": (lambda b: (b / "chat_template.jinja").unlink(), "its signature does not hold"),
    "no signature": (lambda b: (b / SIGNATURE).unlink(), "is not signed"),
    "an empty signature": (lambda b: (b / SIGNATURE).write_bytes(b""), "its signature does not hold"),
    "a cut signature": (cut, "its signature does not hold"),
    "a signature of megabytes": (lambda b: (b / SIGNATURE).write_bytes(b"x" * (2 << 20)), "is not signed"),
    "a link for a signature": (link, "is not signed"),
    "no bundle": (lambda b: b.rename(b.parent / "gone"), "is no directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_is_refused(bundle: Path, keys: dict, name: str) -> None:
    change, said = TAMPERED[name]
    change(bundle)
    with pytest.raises(BundleError, match=said):
        load(bundle, trusted_keys=[keys["ours"][1]])


def test_what_another_signed_is_refused(bundle: Path, keys: dict) -> None:
    with pytest.raises(BundleError, match="its signature does not hold"):
        load(bundle, trusted_keys=[keys["another"][1]])
    sign(bundle, keys["another"][0])
    with pytest.raises(BundleError, match="its signature does not hold"):
        load(bundle, trusted_keys=[keys["ours"][1]])


def test_the_environment_sets_the_policy_for_every_way_to_run(
    bundle: Path, keys: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep.join(str(keys[name][1]) for name in ("another", "ours")))
    load(bundle)
    open_session(Bundle(bundle))
    assert run(["generate", str(bundle), "the", "--raw", "--max-new-tokens", "2"]) == 0
    (bundle / SIGNATURE).unlink()
    for way in (lambda: load(bundle), lambda: open_session(Bundle(bundle))):
        with pytest.raises(BundleError, match="is not signed"):
            way()
    for command in (["generate", str(bundle), "the"], ["verify", str(bundle)], ["bench", str(bundle), "--rounds", "1"]):
        assert run(command) == 1
        assert "is not signed" in capsys.readouterr().err


def test_a_policy_that_cannot_be_kept_refuses_everything(
    bundle: Path, keys: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "none.pub").write_text("no key")
    for given, said in (([], "names no key"), ([tmp_path / "gone.pub"], "cannot be read"),
                        ([tmp_path / "none.pub"], "is no public key"), ([3], "trusted_keys")):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            load(bundle, trusted_keys=given)
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(OptionError, match=f"{VARIABLE} names no key"):
        load(bundle)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(OptionError, match="signatures need model-signing"):
        load(bundle, trusted_keys=[keys["ours"][1]])


def test_the_commands_sign_and_verify(
    bundle: Path, keys: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path, "hidden", b"secret")
    assert run(["sign", str(bundle), "--key", str(private)]) == 1
    assert "is no private key that signs" in capsys.readouterr().err
    monkeypatch.setenv("EDGELLM_KEY_PASSWORD", "secret")
    assert run(["sign", str(bundle), "--key", str(private)]) == 0
    assert run(["verify", str(bundle), "--key", str(keys["another"][1]), "--key", str(public)]) == 0
    assert f"Signed by {public}, and unchanged since." in capsys.readouterr().out
    flip(bundle)
    assert run(["verify", str(bundle), "--key", str(public)]) == 1
    (bundle / "model.onnx.data").write_bytes(b"")
    assert run(["sign", str(bundle), "--key", str(private)]) == 1  # what is damaged is not signed
    assert sorted(p.name for p in bundle.glob(".*")) == []


def test_a_signed_bundle_is_a_bundle_that_may_be_replaced(bundle: Path) -> None:
    check_destination(bundle, force=True)
    with pytest.raises(ExportError, match="replace it with --force"):
        check_destination(bundle, force=False)
