"""Pretend to have an A100: kernels run on the CPU, and what they move and compute is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.benchmarks.gpuless import emulate
from oner_fast.ops import library

SECTOR = 32
A100 = SimpleNamespace(
    name="NVIDIA A100-SXM4-80GB", major=8, minor=0, multi_processor_count=108, total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32, L2_cache_size=40 * 2**20,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=163 * 2**10,
    shared_memory_per_multiprocessor=164 * 2**10, gcnArchName="", is_integrated=0,
)  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Counts of forward and backward together.

    Args:
        launches: number of kernel launches. `operations`: number of eager PyTorch operations between them.
        dram: bytes that launches read and write, each sector once for each launch. This is the traffic if nothing stays
            in L2 from one kernel to the next. Eager operations count the bytes of their tensors.
        eager: the part of `dram` that eager operations move.
        sectors: bytes of all sectors that the warps of kernels requested, cache hits included.
        instructions: number of warp instructions. `tensor_flops`: FLOPs of matrix instructions.
        conflicts: wavefronts of shared memory beyond the ideal.
    """

    launches: int
    operations: int
    dram: int
    eager: int
    sectors: int
    instructions: int
    tensor_flops: int
    conflicts: int


@contextmanager
def emulated_a100() -> Iterator[list[Any]]:
    """Run Triton's kernels on CPU tensors while torch.cuda answers as an A100 would; yield the log of launches."""
    answers: dict[str, Any] = {
        "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (A100.major, A100.minor),
        "get_device_name": lambda device=None: A100.name, "get_device_properties": lambda device=None: A100,
        "set_device": lambda device: None, "synchronize": lambda device=None: None, "_lazy_init": lambda: None,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Blocks may order each other by atomics, so races between blocks are not reported; results are checked.
        yield stack.enter_context(emulate.active(global_race=False, race=False))


def count(run: Callable[[], Sequence[Tensor]], log: list[Any]) -> tuple[Counts, Sequence[Tensor]]:
    """Run once inside `emulated_a100`; return the counts and the results."""
    log.clear()
    eager = _Eager()
    launch = library._Launcher.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        with eager:  # inside a raw op no mode is active
            return launch(self, *arguments)

    with mock.patch.object(library._Launcher, "__call__", counted), eager:
        results = run()
    stats = [one.stats for one in log]
    memory = [(kind, access) for one in stats for kind, access in one.memory.items()]
    moved = sum(one.unique_read_bytes + one.unique_write_bytes for one in stats)
    counts = Counts(
        launches=len(stats),
        operations=eager.operations,
        dram=moved + eager.bytes,
        eager=eager.bytes,
        sectors=SECTOR * sum(access.sectors for kind, access in memory if kind.startswith("global")),
        instructions=sum(one.warp_instructions for one in stats),
        tensor_flops=sum(one.tensor_flops for one in stats),
        conflicts=sum(a.wavefronts - a.ideal_wavefronts for kind, a in memory if kind.startswith("shared")),
    )
    return counts, results


class _Eager(TorchDispatchMode):
    """Count the bytes that eager operations read and write: each input and output once, no views and no allocations."""

    ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func.namespace != "aten":  # an op of a library; operations inside our ops are counted where they run
            return results
        returns = func._schema.returns
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        name = func._schema.name.removeprefix("aten::")
        if is_view or name in self.ALLOCATE:
            return results
        fills = name.startswith("new_") or name.endswith("_like")  # only the shape of its input is read
        given, _ = torch.utils._pytree.tree_flatten(() if fills else (args, kwargs))
        made, _ = torch.utils._pytree.tree_flatten(results)
        moved = [one for one in (*given, *made) if isinstance(one, Tensor)]
        if sum(one.numel() for one in moved) > 1:
            self.operations += 1
            self.bytes += sum(_bytes(one) for one in moved)
        return results


def _bytes(x: Tensor) -> int:
    """Return the bytes of memory that a tensor covers: an expanded tensor is read once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
