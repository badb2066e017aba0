from __future__ import annotations

import gc
import itertools
import os
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

pytest_plugins = ["real_model"]

# The same examples each time: a test that fails for one person fails for all. `--hypothesis-profile=default` explores.
# None is timed: a busy machine, or the first example that imports something, is no fault.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

# Two test processes on two cores: libraries that each take both cores only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests neither believe nor change what lies in the caches of whoever runs them.
os.environ["EDGELLM_CACHE_DIR"] = ""

# Some tests import ONNX Runtime by themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _begin_draws() -> None:
    import torch

    seed = 2026  # not 0, which tests give to generators of their own: chance weights and chance noise would be the same
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Each fixture begins its draws anew, so that a model of chance weights is the same in any order of tests."""
    _begin_draws()


_COLLECT_EVERY = 50
_tests = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Spare the collector what thousands of tests and PyTorch made: a look at all of it takes half a second."""
    if next(_tests) % _COLLECT_EVERY == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _begin_draws()


@pytest.fixture(autouse=True)
def _no_fresh_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers without a seed draw the same in every run: an unlucky draw would fail a test once in a hundred runs."""
    begin: Any = np.random.PCG64
    fresh = itertools.count()
    monkeypatch.setattr(np.random, "PCG64", lambda seed=None: begin(next(fresh) if seed is None else seed))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
