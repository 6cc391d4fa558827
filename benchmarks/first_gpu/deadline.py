"""A plugin of pytest that skips the tests which would start after a moment in time.

ONER_FAST_UNTIL=1700000000 pytest -p oner_fast.benchmarks.first_gpu.deadline
"""

from __future__ import annotations

import os
import time
from typing import Any

UNTIL = "ONER_FAST_UNTIL"
REASON = "no time was left for it"


def pytest_runtest_setup(item: Any) -> None:
    """Skip a test once the clock has reached `ONER_FAST_UNTIL`, in seconds since 1970."""
    import pytest

    if time.time() >= float(os.environ.get(UNTIL, "inf")):
        pytest.skip(REASON)
