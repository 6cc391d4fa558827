"""Errors that both the interpreter and the emulation of compiled PTX catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def test_an_access_outside_the_tensors(log: Any, kernels: Any, caught: Callable[[str], Any]) -> None:
    inputs = [torch.randn(2, 200, 64).half() for _ in range(4)]
    with caught("(?i)out.?of.?bounds"):
        kernels.run_flash(inputs, causal=False, length=240)


def test_a_race_between_programs(log: Any, kernels: Any, caught: Callable[[str], Any]) -> None:
    with caught("(?i)race"):
        kernels.add_rows[(4,)](torch.ones(4, 64), torch.zeros(64), 64, BLOCK=64)


def test_an_error_names_the_line_of_the_kernel(log: Any, kernels: Any, caught: Callable[[str], Any]) -> None:
    with caught(r"sample_kernels\.py:\d+"):
        kernels.add_rows[(4,)](torch.ones(4, 64), torch.zeros(64), 64, BLOCK=64)
