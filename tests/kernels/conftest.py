"""Run Triton kernels by what this process has: a GPU; Triton's interpreter, made strict (TRITON_INTERPRET=1); or the
compiled sm_80 PTX on the CPU. `make test` runs the folder twice, interpreted and compiled."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.benchmarks.gpuless import tools

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class WithoutTriton(pytest.Module):
    """A file of tests that cannot be imported."""

    def collect(self) -> Any:
        pytest.skip("needs triton", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Without Triton there is nothing to import."""
    return WithoutTriton.from_parent(parent, path=module_path) if tools.missing("triton") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """A compilation by g++ is what takes long: what is `slow_emulated` is `slow` where kernels are emulated."""
    emulated = not (INTERPRETED or torch.cuda.is_available())
    if emulated and item.get_closest_marker("slow_emulated"):
        item.add_marker("slow")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def executor(device: str, request: pytest.FixtureRequest, needs: Callable[..., None]) -> Iterator[Any]:
    """Run the kernels; give the log of launches where they are emulated, else None."""
    settings = getattr(request, "param", {})
    if device == "cuda":
        yield None
        return
    mode, wanted = ("interpreter", tools.FOR_INTERPRETER) if INTERPRETED else ("emulate", tools.FOR_EMULATE)
    needs(*wanted)
    with importlib.import_module(f"oner_fast.benchmarks.gpuless.{mode}").active(**settings) as log:
        yield None if INTERPRETED else log
