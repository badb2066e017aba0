"""A loaded bundle needs its folder no more, and links lead nowhere but inside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_bundles import attention_bundle, copied

from edgellm.checkpoints import load_checkpoint, save_checkpoint
from edgellm_runtime import BundleError, load

MESSAGES = [{"role": "user", "content": "hello"}]


def answers(path: str | Path) -> tuple[list[int], list[int]]:
    model = load(path, threads=1)
    return model.generate("hello", max_new_tokens=4).tokens, model.chat(MESSAGES, max_new_tokens=4).tokens


def test_relative_path_and_another_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(attention_bundle())
    copied(attention_bundle(), tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load("bundle", threads=1)
    monkeypatch.chdir("/")
    assert model.generate("hello", max_new_tokens=4).tokens == expected[0]
    assert model.chat(MESSAGES, max_new_tokens=4).tokens == expected[1]
    assert model.bundle.file("goldens.json").is_file()


def test_folder_that_is_gone_or_exchanged_after_loading(tmp_path: Path) -> None:
    expected = answers(attention_bundle())
    bundle = copied(attention_bundle(), tmp_path)
    gone, exchanged = load(bundle, threads=1), load(bundle, threads=1)
    (bundle / "tokenizer.json").write_text("{}")
    (bundle / "chat_template.jinja").write_text("another")
    assert exchanged.chat(MESSAGES, max_new_tokens=4).tokens == expected[1]
    shutil.rmtree(bundle)
    assert gone.generate("hello", max_new_tokens=4).tokens == expected[0]
    assert gone.chat(MESSAGES, max_new_tokens=4).tokens == expected[1]


def test_link_out_of_the_bundle_is_refused_by_its_name_with_the_remedy(tmp_path: Path) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    (tmp_path / "blobs").mkdir()
    blob = (bundle / "tokenizer.json").rename(tmp_path / "blobs" / "1f2e")
    (bundle / "tokenizer.json").symlink_to("../blobs/1f2e")
    with pytest.raises(BundleError) as refused:
        load(bundle)
    assert str(refused.value) == (
        f"{bundle}/tokenizer.json: a symbolic link to ../blobs/1f2e, outside the bundle, and links are not followed "
        f"there; make a folder of the files themselves: cp -rL {bundle} COPY"
    )
    shutil.copytree(bundle, tmp_path / "copy")  # follows links, as cp -L does
    assert blob.is_file()
    assert answers(tmp_path / "copy") == answers(attention_bundle())


def test_links_inside_the_bundle_as_volumes_of_kubernetes_have_them(tmp_path: Path) -> None:
    bundle = tmp_path / "volume"
    shutil.copytree(attention_bundle(), bundle / "..2026_11_25")
    (bundle / "..data").symlink_to("..2026_11_25")
    for file in (bundle / "..2026_11_25").iterdir():
        (bundle / file.name).symlink_to(f"..data/{file.name}")
    assert answers(bundle) == answers(attention_bundle())


def test_checkpoint_of_links_as_a_cache_has_them(tmp_path: Path) -> None:
    from tiny_bundles import attention_model, text_assets

    save_checkpoint(
        tmp_path / "plain", attention_model(), architecture="decoder", tokenizer_json=text_assets().tokenizer_json
    )
    snapshot, blobs = tmp_path / "snapshots" / "1f2e", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_checkpoint(snapshot).tokenizer_json == text_assets().tokenizer_json
