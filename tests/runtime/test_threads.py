"""Threads: as many as there are cores to run them, by affinity and by quota, unless a sound number is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_bundles import attention_bundle

from edgellm_runtime import OptionError, load
from edgellm_runtime.threads import VARIABLE, available_cores, limited_threads, most_threads, thread_count

V2 = "31 23 0:28 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n22 1 0:2 / / rw - ext4 /dev/sda rw\nodd\n"


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def system(root: Path, *, group: str, mount: str, quotas: dict[str, str]) -> Path:
    """A file system that holds what Linux says of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    (root / "proc/self/mountinfo").write_text(OTHER + mount)
    for name, text in quotas.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("group", "top", "quotas", "cores"),
    [
        ("0::/\n", "/", {"cpu.max": "200000 100000"}, 2),  # a container with a namespace of its own
        ("0::/\n", "/", {"cpu.max": "max 100000"}, 64),
        ("0::/\n", "/", {}, 64),
        ("0::/\n", "/", {"cpu.max": "350000 100000"}, 3),
        ("0::/\n", "/", {"cpu.max": "20000 100000"}, 1),
        (
            "0::/a/b\n",
            "/",
            {"a/cpu.max": "200000 100000", "a/b/cpu.max": "800000 100000"},
            2,
        ),  # the outer one holds too
        ("0::/a/b\n", "/", {"a/cpu.max": "max 100000", "a/b/cpu.max": "100000 50000"}, 2),
        ("0::/a/b\n", "/a", {"b/cpu.max": "400000 100000"}, 4),
        ("0::/../elsewhere\n", "/", {"cpu.max": "400000 100000"}, 4),
        ("0::/\n", "/", {"cpu.max": "nonsense"}, 64),
        ("0::/\n", "/", {"cpu.max": "many 100000"}, 64),
    ],
)
def test_quota_of_control_groups_of_version_2(
    tmp_path: Path, group: str, top: str, quotas: dict[str, str], cores: int
) -> None:
    assert available_cores(system(tmp_path, group=group, mount=V2.format(top=top), quotas=quotas)) == cores


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("path", "top", "quotas", "cores"),
    [
        ("/", "/", {"": (200_000, 100_000)}, 2),
        ("/", "/", {"": (-1, 100_000)}, 64),
        ("/docker/1f", "/docker/1f", {"": (50_000, 25_000)}, 2),  # a container that sees the host's name of its group
        ("/pod/1f", "/", {"pod/": (400_000, 100_000), "pod/1f/": (-1, 100_000)}, 4),
    ],
)
def test_quota_of_control_groups_of_version_1(
    tmp_path: Path, path: str, top: str, quotas: dict[str, tuple[int, int]], cores: int
) -> None:
    files = {}
    for folder, (quota, period) in quotas.items():
        files[f"cpu,cpuacct/{folder}cpu.cfs_quota_us"] = str(quota)
        files[f"cpu,cpuacct/{folder}cpu.cfs_period_us"] = str(period)
    group = f"9:name=systemd:/\n3:cpuset:/\n2:cpu,cpuacct:{path}\n0::/\n"
    assert available_cores(system(tmp_path, group=group, mount=V1.format(top=top), quotas=files)) == cores


@pytest.mark.usefixtures("many_cores")
def test_affinity_counts_where_there_are_no_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores(tmp_path) == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert available_cores(tmp_path) == 3
    root = system(tmp_path, group="0::/\n", mount=V2.format(top="/"), quotas={"cpu.max": "800000 100000"})
    assert available_cores(root) == 3


def test_order_of_what_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert thread_count() == available_cores()
    monkeypatch.setenv(VARIABLE, "3")
    assert (thread_count(), thread_count(2)) == (3, 2)
    with limited_threads(5):
        assert (thread_count(), thread_count(2)) == (5, 2)
        with limited_threads(None):
            assert thread_count() == 5
    assert thread_count() == 3


@pytest.mark.parametrize("threads", [0, -1, 100_000, True, 1.5, "2"])
def test_impossible_number_of_threads_is_refused_at_once(threads: object) -> None:
    for refuse in (lambda: load(attention_bundle(), threads=threads), lambda: thread_count(threads)):  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=rf"^threads is {threads!r}; it must be an integer from 1 to \d+$"):
            refuse()


@pytest.mark.parametrize("value", ["0", "100000", "-1", "two", "1.5", "²", "9" * 30])
def test_impossible_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(OptionError, match=rf"^EDGELLM_THREADS is '?{value}'?; it must be an integer from 1 to \d+$"):
        load(attention_bundle())


def test_loaded_model_uses_the_threads_that_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert load(attention_bundle()).session._backend.threads == 1  # type: ignore[attr-defined]
    assert load(attention_bundle(), threads=2).session._backend.threads == 2  # type: ignore[attr-defined]


def test_most_threads_that_may_be_asked_for_are_at_least_the_cores() -> None:
    assert most_threads() >= max(64, os.cpu_count() or 1)
    assert thread_count(most_threads()) == most_threads()
