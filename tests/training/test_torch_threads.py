"""PyTorch's threads in edgellm's commands: as many as there are cores, and asleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINT = "import os, torch; print(torch.get_num_threads(), os.environ.get('OMP_WAIT_POLICY'))"


def printed(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "EDGELLM_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=kept | environment
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("environment", "result"),
    [
        ({"EDGELLM_THREADS": "3"}, "3 PASSIVE"),
        ({"OMP_NUM_THREADS": "1"}, "1 PASSIVE"),
        ({"OMP_NUM_THREADS": "1", "EDGELLM_THREADS": "2"}, "2 PASSIVE"),
        ({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}, "1 ACTIVE"),
        ({"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}, "1 None"),
    ],
)
def test_torch_follows_the_threads_of_edgellm_and_the_users_own_settings(
    environment: dict[str, str], result: str
) -> None:
    code = f"from edgellm.torch_threads import limit_torch_threads; limit_torch_threads(); {PRINT}"
    assert printed(code, **environment) == result


def test_torch_keeps_to_the_quota_by_itself() -> None:
    code = f"""
import edgellm.torch_threads as t
t.available_cores = lambda: 1
t.limit_torch_threads()
{PRINT}
"""
    assert printed(code, OMP_NUM_THREADS="8") == "1 PASSIVE"


@pytest.mark.parametrize("command", ["train", "export"])
def test_commands_of_pytorch_have_its_threads_sleep(command: str) -> None:
    code = f"from edgellm.cli import run; run([{command!r}, 'nowhere', '-o', 'nowhere', '--threads', '2']); {PRINT}"
    assert printed(code) == "2 PASSIVE"
