"""CUDA C++ kernels on the CPU: a right one passes, a missing barrier and too little shared memory are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks.gpuless import cuda, tools
from oner_fast.benchmarks.gpuless.ptx import Kernel, KernelFault

SOURCE = r"""
#include <cassert>
__device__ __noinline__ float block_sum(float v, float* part) {        // shuffles, then shared memory
  for (int d = 16; d; d >>= 1) v += __shfl_down_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
#ifndef NO_SYNC
  __syncthreads();
#endif
  float s = 0;
  for (int i = 0; i < blockDim.x / 32; i++) s += part[i];
  return s;
}
extern "C" __global__ void row_sums(const float* x, float* sums, float* total, int* positive, int n) {
  extern __shared__ float part[];
  float v = 0;
  int count = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    v += x[(size_t)blockIdx.x * n + i];
    count += x[(size_t)blockIdx.x * n + i] > 0;
  }
  float s = block_sum(v, part);
  atomicAdd(positive, count);
  int odd = __syncthreads_count(count & 1);
  assert(odd <= (int)blockDim.x);
  if (threadIdx.x == 0) { sums[blockIdx.x] = s; atomicAdd(total, s); }
}
"""


@pytest.fixture(autouse=True)
def compilers(needs: Callable[..., None]) -> None:
    needs(*tools.FOR_CUDA)


@pytest.fixture(scope="module")
def row_sums() -> Callable[..., Kernel]:
    return lambda *flags: cuda.Module(SOURCE, flags=flags)["row_sums"]


def run_sums(kernel: Kernel, x: Tensor, shared: int = 4 * 4) -> tuple[Tensor, Tensor, Tensor]:
    sums, total, positive = torch.full((len(x),), float("nan")), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    kernel.launch(len(x), 128, [x, sums, total, positive, x.shape[1]], shared=shared, seed=3, shuffle=1)
    return sums, total, positive


def test_sums_with_shuffles_shared_memory_and_atomics(row_sums: Any) -> None:
    x = torch.randn(5, 1000)
    sums, total, positive = run_sums(row_sums(), x)
    torch.testing.assert_close(sums.double(), x.double().sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(total.double(), x.double().sum()[None], atol=1e-3, rtol=0)
    assert positive.item() == (x > 0).sum()
    with pytest.raises(KernelFault, match="SHARED OUT OF BOUNDS"):
        run_sums(row_sums(), x, shared=8)


def test_a_missing_barrier_is_a_race(row_sums: Any) -> None:
    with pytest.raises(KernelFault, match="SHARED RACE"):
        run_sums(row_sums("-DNO_SYNC"), torch.randn(5, 1000))


def test_errors_of_nvcc_are_reported() -> None:
    with pytest.raises(cuda.NvccError, match=r"kernel\.cu: .*error"):
        cuda.Module("this is\nno CUDA")


def test_a_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert tools.missing(*tools.FOR_CUDA) == ["nvcc"]
    with pytest.raises(cuda.NvccError, match="nvcc was not found"):
        cuda.Module(SOURCE)
