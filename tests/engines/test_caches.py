"""Caches of a user: what is believed, what is dropped, and that nothing which is wrong with one stops any work."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm_runtime.backends import caches
from edgellm_runtime.backends.caches import VARIABLE, CacheFile, cache_directory

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX")
once_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache directory, not made yet; what is logged once a process is logged once a test."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "caches"))
    caches._log_once.cache_clear()
    yield tmp_path / "caches"
    caches._log_once.cache_clear()


def written(data: bytes = b"what was learned", *key: str) -> Path:
    cache = CacheFile("kernels", *key)
    cache.write(data)
    assert cache.fault == "" and cache.path is not None
    return cache.path


def refused(reason: str) -> CacheFile:
    """A cache that is not believed, for that reason, which is in the log too."""
    cache = CacheFile("kernels")
    assert cache.read() is None
    assert reason in cache.fault
    return cache


# --- where ----------------------------------------------------------------------------------------------------------


def test_caches_lie_in_the_users_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    usual, moved = tmp_path / ".cache", tmp_path / "moved"
    for xdg, expected in (("", usual), (str(moved), moved), ("relative", usual)):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert cache_directory() == expected / "edgellm"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"


def test_an_empty_variable_turns_caches_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written()
    monkeypatch.setenv(VARIABLE, "")
    cache = CacheFile("kernels")
    assert not cache.on and cache.read() is None
    cache.write(b"more")
    assert cache.fault == "", "what was asked for is no fault"
    assert path.read_bytes().endswith(b"what was learned")


def test_without_a_home_there_are_none_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    cache = CacheFile("kernels")
    cache.write(b"x")
    assert cache.read() is None and "home directory" in cache.fault


# --- what is read back ----------------------------------------------------------------------------------------------


@once_a_folder
@given(data=st.binary(max_size=4096), key=st.lists(st.text(max_size=20), max_size=4))
def test_what_was_written_is_read_back_under_its_key_only(folder: Path, data: bytes, key: list[str]) -> None:
    CacheFile("timing", *key).write(data)
    assert CacheFile("timing", *key).read() == data
    assert CacheFile("timing", *key, "other").read() is None
    assert CacheFile("kernels", *key).read() is None


def test_keys_of_other_parts_are_other_files(folder: Path) -> None:
    assert CacheFile("k", "ab", "c").path != CacheFile("k", "a", "bc").path


@POSIX
def test_only_the_user_may_look_into_it(folder: Path) -> None:
    path = written()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_reading_makes_no_directory(folder: Path) -> None:
    cache = CacheFile("kernels")
    assert cache.read() is None and cache.fault == ""
    assert not folder.exists()


def test_what_is_there_already_is_not_written_again(folder: Path) -> None:
    path = written(b"same")
    before = path.stat().st_ino
    cache = CacheFile("kernels")
    assert cache.read() == b"same"
    cache.write(b"same")
    assert path.stat().st_ino == before
    cache.write(b"more")
    assert path.stat().st_ino != before and CacheFile("kernels").read() == b"more"


# --- what is not believed -------------------------------------------------------------------------------------------


@once_a_folder
@given(at=st.integers(min_value=0), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_cache_is_dropped_and_written_anew(folder: Path, at: int, bit: int, cut: bool) -> None:
    path = written(b"what was learned" * 3)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content = content[:at] if cut else content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    path.write_bytes(bytes(content))
    cache = refused("is damaged; it is made anew")
    assert not path.exists()
    cache.write(b"anew")
    assert CacheFile("kernels").read() == b"anew"


def test_a_cache_in_the_place_of_another_is_not_taken_for_it(folder: Path) -> None:
    path = written(b"of another GPU", "9.0")
    mine = CacheFile("kernels").path
    assert mine is not None
    path.rename(mine)
    refused("is damaged")


def test_a_cache_that_is_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(b"x" * 100)
    monkeypatch.setattr(caches, "MOST_BYTES", 99)
    refused("is damaged")
    assert not path.exists()
    cache = CacheFile("kernels")
    cache.write(b"x" * 100)
    assert "bytes are too many for" in cache.fault and not path.exists()


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_not_believed(mode: int, folder: Path) -> None:
    path = written()
    path.chmod(mode)
    cache = refused(f"no cache is read: other users may write to {path}; ")
    assert path.exists()
    cache.write(b"mine")  # in its place, by a file that is ours
    assert CacheFile("kernels").read() == b"mine"


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_not_used(mode: int, folder: Path) -> None:
    path = written()
    folder.chmod(mode)
    cache = refused(f"no cache is read: other users may write to {folder}; ")
    cache.write(b"more")
    assert f"no cache is written: other users may write to {folder}; " in cache.fault
    assert path.read_bytes().endswith(b"what was learned")


@POSIX
@pytest.mark.parametrize("what", ["it", "its directory"])
def test_what_another_user_owns_is_not_believed(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written()
    owner = os.geteuid()
    if what == "its directory":
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    else:
        real = os.fstat

        def foreign(descriptor: int) -> os.stat_result:
            about = list(real(descriptor))
            about[stat.ST_UID] = owner + 1
            return os.stat_result(about)

        monkeypatch.setattr(os, "fstat", foreign)
    refused(f"{path if what == 'it' else folder} belongs to another user")
    assert path.exists()


@POSIX
def test_a_link_or_a_pipe_in_its_place_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = written()
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    refused(f"no cache is read: {folder}: ")
    path.unlink()
    os.mkfifo(path, 0o600)
    refused(f"{path} is no plain file")


# --- what cannot be written -----------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "caches"))
    cache = CacheFile("kernels")
    cache.write(b"x")
    assert "no cache is written" in cache.fault and VARIABLE in cache.fault
    assert CacheFile("kernels").read() is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_the_right_to_write_stops_nothing(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    cache = CacheFile("kernels")
    cache.write(b"x")
    assert "Permission denied" in cache.fault


def test_a_full_disk_leaves_the_old_cache_and_no_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(b"old")
    cache = CacheFile("kernels")

    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        cache.write(b"new")
    assert "No space left on device" in cache.fault
    assert CacheFile("kernels").read() == b"old"
    assert len(list(folder.iterdir())) == 1


def test_a_fault_is_logged_once_a_process(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.joinpath("caches").write_text("no directory")
    with caplog.at_level(logging.WARNING, logger="edgellm_runtime"):
        for name in "abc":
            CacheFile("kernels", name).write(b"x")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no cache is written" in caplog.text


# --- several processes, and room ------------------------------------------------------------------------------------


WRITER = """
import sys
from edgellm_runtime.backends.caches import CacheFile
for _ in range(100):
    CacheFile("kernels").write(bytes([int(sys.argv[1])]) * 100_000)
"""


def test_writers_at_once_leave_one_whole_cache(folder: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)]) for n in range(3)]
    seen = set()
    while any(process.poll() is None for process in processes):
        cache = CacheFile("kernels")
        data = cache.read()
        assert cache.fault == "", "a reader sees a whole cache or none"
        if data is not None:
            assert len(data) == 100_000 and len(set(data)) == 1
            seen.add(data[0])
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert seen and len(list(folder.iterdir())) == 1


def test_there_is_an_end_to_the_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [written(b"x" * 1000, str(n)) for n in range(4)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (time.time() - 60 * (age + 1),) * 2)
    CacheFile("kernels", "0").read()  # the oldest is wanted again
    rest = folder / "kernels-x.part"
    rest.write_bytes(b"of a process that was killed")
    os.utime(rest, (0, 0))
    (folder / "not ours").write_bytes(b"x" * 5000)
    monkeypatch.setattr(caches, "MOST_TOGETHER", 3500)
    last = written(b"x" * 1000, "last")
    assert {p.name for p in folder.iterdir()} == {paths[0].name, paths[3].name, last.name, "not ours"}
