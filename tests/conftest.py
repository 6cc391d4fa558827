"""Settings of every test: two threads, and a process-wide seed, so that a failure can be repeated."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Programs that tests start with -c or -m must not find the folder the tests are run from on their path.
os.environ["PYTHONSAFEPATH"] = "1"

hypothesis.settings.register_profile("oner_fast", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("oner_fast")


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    """The same threads, seed and determinism for every test, whatever the one before it did."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
