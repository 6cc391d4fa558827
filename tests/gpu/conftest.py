"""Tests that need a GPU; `make gpu` runs them and fails where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

WANTED = os.environ.get("ONER_FAST_GPU") == "1"


def why_no_gpu() -> str:
    """Empty where torch has a GPU."""
    if torch.cuda.is_available():
        return ""
    return "this torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skip without a GPU, or fail where one was promised; leave no setting behind."""
    if reason := why_no_gpu():
        assert not WANTED, f"ONER_FAST_GPU=1 promises a GPU, but {reason}"
        pytest.skip(f"needs a GPU: {reason}")
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()
