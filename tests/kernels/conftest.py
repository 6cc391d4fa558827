"""Every test here runs Triton kernels by what this process has: a GPU; Triton's interpreter (TRITON_INTERPRET=1); or,
where the checkers of ../shared (or $ONER_FAST_GPULESS) are, the compiled sm_80 PTX on the CPU. `make test` runs the
folder twice, interpreted and compiled."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHECKERS = Path(os.environ.get("ONER_FAST_GPULESS") or Path(__file__).parents[2].parent / "shared")
IN_CI = os.environ.get("ONER_FAST_CI") == "1"


def checkers(module: str) -> Any:
    """A module of the checkers, or None where they are not."""
    if not (CHECKERS / "gpuless").is_dir():
        assert not IN_CI, f"the checkers are missing at {CHECKERS}: these tests must not be skipped here"
        return None
    if str(CHECKERS) not in sys.path:
        sys.path.append(str(CHECKERS))
    return importlib.import_module(f"gpuless.{module}")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without Triton there is nothing to import."""
    return True if importlib.util.find_spec("triton") is None and collection_path.suffix == ".py" else None


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def executor(device: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """What runs the kernels; gives the log of launches where they are emulated, else None."""
    settings = getattr(request, "param", {})
    if device == "cuda":
        yield None
    elif INTERPRETED:
        strict = checkers("interpreter")
        if strict is None:
            yield None
        else:
            with strict.active(**settings):
                yield None
    elif (emulator := checkers("emulate")) is not None:
        with emulator.active(**settings) as log:
            yield log
    else:
        pytest.skip(f"no GPU, no TRITON_INTERPRET=1, and no checkers at {CHECKERS}")
