"""The checkers of GPU kernels on small kernels: right ones pass, planted errors are caught.

`make test` runs the folder twice, with TRITON_INTERPRET=1 and without.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oner_fast.benchmarks.gpuless import tools

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def kernels(needs: Callable[..., None]) -> Any:
    """The module sample_kernels.py."""
    needs("triton")
    spec = importlib.util.spec_from_file_location("sample_kernels", Path(__file__).with_name("sample_kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample_kernels"] = module  # Triton looks the module of a kernel up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled(needs: Callable[..., None]) -> None:
    """Skip where kernels are interpreted, or cannot be emulated."""
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    needs(*tools.FOR_EMULATE)


@pytest.fixture
def log(needs: Callable[..., None]) -> Iterator[Any]:
    """Run kernels in this process's mode; give the log of launches, or None where they are interpreted."""
    mode, wanted = ("interpreter", tools.FOR_INTERPRETER) if INTERPRETED else ("emulate", tools.FOR_EMULATE)
    needs(*wanted)
    with importlib.import_module(f"oner_fast.benchmarks.gpuless.{mode}").active() as found:
        yield None if INTERPRETED else found


@pytest.fixture
def caught(needs: Callable[..., None]) -> Callable[[str], Any]:
    """`with caught("race"):` expects what reports an error of that kind in this process's mode."""

    def expect(kind: str) -> Any:
        if INTERPRETED:
            from triton.runtime.errors import InterpreterError as fault
        else:
            from oner_fast.benchmarks.gpuless.ptx import KernelFault as fault
        return pytest.raises(fault, match=kind)

    return expect
