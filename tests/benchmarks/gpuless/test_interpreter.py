"""The strict interpreter: what it repairs, catches and counts, and that it can be taken away."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not set: nothing is interpreted", allow_module_level=True)

import numpy as np
import triton.runtime.interpreter as stock
from triton.runtime.errors import InterpreterError

from oner_fast.benchmarks.gpuless import interpreter
from oner_fast.benchmarks.gpuless.interpreter.rounding import round_tf32


def test_lanes_masked_off_without_other_are_nan(kernels: Any) -> None:
    y = torch.zeros(1)
    with interpreter.active():
        kernels.sum_masked[(1,)](torch.ones(64), y, 40, BLOCK=64)
    assert y.isnan().all()
    with interpreter.active(poison=False):
        kernels.sum_masked[(1,)](torch.ones(64), y, 40, BLOCK=64)
    assert not y.isnan().any()


def test_a_check_that_is_off_reports_nothing(kernels: Any) -> None:
    y = torch.zeros(64)
    with interpreter.active(race=False):
        kernels.add_rows[(4,)](torch.ones(4, 64), y, 64, BLOCK=64)
    assert y.tolist() == [4.0] * 64


def test_programs_run_in_a_random_order(kernels: Any) -> None:
    orders = []
    for seed in (None, 1, 1, 2):
        out, counter = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with interpreter.active(shuffle=seed):
            kernels.note_order[(8,)](out, counter)
        orders.append(out.tolist())
    assert orders[0] == list(range(8)) and orders[1] == orders[2] != orders[3]
    assert all(sorted(each) == orders[0] for each in orders)


def test_atomic_adds_of_bfloat16_sum(kernels: Any) -> None:
    y = torch.zeros(64, dtype=torch.bfloat16)
    with interpreter.active():
        kernels.add_rows_atomically[(4,)](torch.full((4, 64), 1.5, dtype=torch.bfloat16), y, 64, BLOCK=64)
    assert y.tolist() == [6.0] * 64


def test_float32_products_are_rounded_to_tf32_unless_told_otherwise(kernels: Any) -> None:
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    with interpreter.active():
        rounded = kernels.run_matmul(a, b, BM=32)
    with interpreter.active(tf32=False):
        whole = kernels.run_matmul(a, b, BM=32)
    exact = a.double() @ b.double()
    assert (whole - exact).abs().max() < 1e-5 < 1e-4 < (rounded - exact).abs().max()


def test_tf32_has_ten_bits_and_ties_go_to_even() -> None:
    step = 2.0**-10
    given = np.array([1 + step / 2, 1 + 3 * step / 2, 1 + 0.6 * step, -1 - 0.4 * step, np.inf, np.nan], np.float32)
    expected = np.array([1, 1 + 2 * step, 1 + step, -1, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(round_tf32(given), expected)


def test_bytes_sectors_and_flops_are_counted(kernels: Any) -> None:
    a, b = torch.randn(64, 32).half(), torch.randn(32, 32).half()
    with interpreter.active() as stats:
        kernels.run_matmul(a, b)
    assert stats.dot_flops == 2 * 64 * 32 * 32
    assert (stats.load_bytes, stats.store_bytes) == (2 * (64 * 32 + 32 * 32), 2 * 64 * 32)
    assert (stats.unique_write_bytes, stats.store_sectors) == (2 * 64 * 32, 2 * 64 * 32 // 32)
    assert stats.summary()["load_efficiency"] == 1.0


def test_outer_settings_and_tritons_own_interpreter_are_restored(kernels: Any) -> None:
    before = stock.InterpreterBuilder.create_dot, stock._get_np_dtype
    x, y = torch.ones(4, 64), torch.zeros(64)
    with interpreter.active(race=False):
        with interpreter.active(), pytest.raises(InterpreterError, match="wrote there too"):
            kernels.add_rows[(4,)](x, y, 64, BLOCK=64)
        kernels.add_rows[(4,)](x, y, 64, BLOCK=64)
    assert (stock.InterpreterBuilder.create_dot, stock._get_np_dtype) == before
