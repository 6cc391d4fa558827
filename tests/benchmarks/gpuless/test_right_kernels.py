"""Right kernels pass every check and give right results, interpreted and as compiled PTX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # float32: tl.dot uses TF32


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - exact.double()).abs().max() / exact.double().abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(log: Any, kernels: Any, dtype: torch.dtype) -> None:
    a, b = torch.randn(130, 80).to(dtype), torch.randn(80, 96).to(dtype)
    for _ in range(2):  # the second launch finds the kernel compiled
        assert_close(kernels.run_matmul(a, b), a.double() @ b.double(), dtype)
    if log is not None:
        assert len(log) == 2 and log[0].stats.tensor_flops >= 2 * 130 * 80 * 96
        assert any("mma" in op for op in log[0].stats.opcodes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(log: Any, kernels: Any, dtype: torch.dtype) -> None:
    x = torch.randn(8, 777).to(dtype)
    y = torch.empty_like(x)
    kernels.softmax[(8,)](x, y, 777, 777, BLOCK=1024)
    assert_close(y, x.double().softmax(-1), dtype)


@pytest.mark.parametrize(
    "dtype", [pytest.param(x, marks=[] if x is torch.bfloat16 else [pytest.mark.slow]) for x in DTYPES], ids=str
)
def test_attention_and_its_gradients(log: Any, kernels: Any, dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 200, 64).to(dtype) for _ in range(4)]
    found, lse = kernels.run_flash(inputs)
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    later = torch.ones(200, 200).triu(1).bool()
    scores = (q @ k.transpose(1, 2) * 64**-0.5).masked_fill(later, -float("inf"))
    exact = scores.softmax(-1) @ v
    exact.backward(inputs[3].double())
    for mine, true in zip(found, (exact, q.grad, k.grad, v.grad), strict=True):
        assert_close(mine, true, dtype)
    assert_close(lse, scores.logsumexp(-1), dtype)


def test_float64(log: Any, kernels: Any) -> None:
    a, b = torch.randn(64, 32, dtype=torch.float64), torch.randn(32, 64, dtype=torch.float64)
    found = kernels.run_matmul(a, b, BM=32, ACC=kernels.tl.float64)
    torch.testing.assert_close(found, a @ b, rtol=1e-12, atol=1e-12)


def test_a_function_that_is_called(log: Any, kernels: Any) -> None:
    x = torch.randn(64)
    y = torch.empty_like(x)
    kernels.call_function[(64,)](x, y, 0.5)
    once = (x * 0.5 + 1) * x
    torch.testing.assert_close(y, (once * 0.5 + 1) * once)
    assert log is None or "call.uni" in log[0].compiled.asm["ptx"]


def test_tensor_descriptors(log: Any, kernels: Any) -> None:
    from triton.backends import driver
    from triton.tools.tensor_descriptor import TensorDescriptor

    if log is not None and not hasattr(driver, "decompose_descriptor"):
        pytest.skip("the emulation takes tensor descriptors apart by a function of Triton 3.8")
    source, target = torch.randn(64, 64), torch.empty(64, 64)
    blocks = [TensorDescriptor.from_tensor(x, [16, 64]) for x in (source, target)]
    kernels.copy_block[(4,)](*blocks, 16)
    assert torch.equal(target, source * 2)


def test_autotuning_takes_one_configuration(log: Any, kernels: Any) -> None:
    x = torch.randn(200)
    y = torch.empty_like(x)
    kernels.double_tuned[lambda meta: (-(-200 // meta["BLOCK"]),)](x, y, 200)
    assert torch.equal(y, x * 2)
    assert log is None or log[0].grid == (4, 1, 1)
