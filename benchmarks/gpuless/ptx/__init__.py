"""Run NVIDIA's PTX on the CPU.

    kernel = Kernel(ptx_text, "my_kernel")
    stats = kernel.launch(grid, block, [tensor, 128, 0.5, None], shared=4096)

PTX from Triton or `nvcc -ptx` is translated to C++, compiled by g++ and run on host memory. The 32 lanes of a warp run
in lockstep. Where they diverge, the lowest basic block runs first, so that they meet again. Warps and blocks run one
after the other.

Caught: out-of-bounds and misaligned accesses to global, shared and local memory; races on shared memory between warps
(no barrier between); races between blocks; cp.async data read before its wait_group and shared memory never written
(both NaN); shuffles from inactive lanes; matrix instructions in a partial warp; barrier deadlock; device asserts;
endless loops.

Not caught: races inside one warp; weak memory ordering; a wild index that lands inside another tensor of the launch; a
store by several warps of the value that is already there. Named barriers for part of a block do not count as
synchronisation (false races). Results are not bit exact: ex2, rcp, tanh and the like are as accurate as the C library,
and mma adds in the order of k.

The instructions are those of sm_80. An unknown instruction or modifier raises `PtxError` with its line. Not emulated:
wgmma, TMA, mbarrier, clusters, device printf, recursion, calls through pointers, f16 accumulators in wmma.
"""

from oner_fast.benchmarks.gpuless.ptx.counters import Access, Stats
from oner_fast.benchmarks.gpuless.ptx.faults import KernelFault
from oner_fast.benchmarks.gpuless.ptx.findings import Finding
from oner_fast.benchmarks.gpuless.ptx.kernel import Checks, Kernel
from oner_fast.benchmarks.gpuless.ptx.parse import PtxError

__all__ = ["Access", "Checks", "Finding", "Kernel", "KernelFault", "PtxError", "Stats"]
