from __future__ import annotations

import os

import pytest

# Two test processes on two cores: libraries that each take both cores only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
