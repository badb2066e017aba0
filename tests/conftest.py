from __future__ import annotations

import os

import pytest
from hypothesis import settings

pytest_plugins = ["real_model"]

# The same examples each time: a test that fails for one person fails for all. `--hypothesis-profile=default` explores.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

# Two test processes on two cores: libraries that each take both cores only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests neither believe nor change what lies in the caches of whoever runs them.
os.environ["EDGELLM_CACHE_DIR"] = ""

# Some tests import ONNX Runtime by themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
