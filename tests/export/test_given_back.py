"""Large blocks of memory that an export has freed are not held by the C library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from edgellm_exporters.weights.memory import SET_BY_USERS

CHILD = """
import sys
import numpy as np
from edgellm_exporters.weights.memory import give_back_large_blocks
from edgellm_runtime.checks.memory import memory_now_and_at_most
if sys.argv[1] == "given back":
    give_back_large_blocks()
before, _ = memory_now_and_at_most()
large = np.ones(24 << 20, dtype=np.uint8)
del large  # from here on, glibc keeps blocks of that size
large = np.ones(20 << 20, dtype=np.uint8)
del large
now, _ = memory_now_and_at_most()
print(now - before)
"""


def held(how: str, **variables: str) -> int:
    """Bytes that a process still has of 20 MiB that were freed."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USERS}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    found = subprocess.run(
        [sys.executable, "-c", CHILD, how], check=True, capture_output=True, text=True, env=environment
    )  # fmt: skip
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps large blocks")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    assert held("left alone") > 16 << 20
    assert held("given back") < 4 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps large blocks")
def test_what_users_have_set_stays() -> None:
    assert held("given back", MALLOC_MMAP_THRESHOLD_=str(32 << 20), MALLOC_TRIM_THRESHOLD_=str(64 << 20)) > 16 << 20
