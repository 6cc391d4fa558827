"""Describe the machine: the facts that measured figures depend on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import oner_fast.ops
from oner_fast import _extension
from oner_fast.doctor import cpu_info

_MALLOC_VARIABLES = ("LD_PRELOAD", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@dataclass(frozen=True)
class Machine:
    """Facts about the machine that a figure depends on."""

    cpu: str
    cores: int
    threads: int
    kernels: str
    matrix_units: str
    cache_bytes: int
    load: float
    gpu: str
    torch: str
    python: str
    compiler: str
    oner_fast: str
    system: str
    allocator: str

    def line(self) -> str:
        """One line for the head of a report."""
        device = f", {self.gpu}" if self.gpu else ""
        units = f" ({self.matrix_units})" if self.matrix_units else ""
        allocator = f", {self.allocator}" if self.allocator else ""
        return (
            f"{self.cpu}{units}{device}, {self.cores} cores, {self.threads} threads, {self.kernels} kernels, "
            f"{self.cache_bytes / 2**20:.0f} MiB of cache, load {self.load:.1f}, torch {self.torch}, "
            f"Python {self.python}, {self.compiler}, oner_fast {self.oner_fast}, {self.system}{allocator}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The facts as a dict for JSON."""
        return asdict(self)


def describe(device: str = "cpu") -> Machine:
    """Describe the machine of this process; `load` counts the runnable processes of the minute before."""
    built = _extension.status().loaded
    return Machine(
        cpu=cpu_info("model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        kernels=torch.ops.oner_fast.cpu_capability() if built else "no compiled",
        matrix_units=", ".join(name for name in ("avx512_bf16", "amx_bf16") if name in cpu_info("flags").split()),
        cache_bytes=cache_bytes(device),
        load=os.getloadavg()[0],
        gpu=f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})" if device != "cpu" else "",
        torch=str(torch.__version__),
        python=platform.python_version(),
        compiler=str(_extension.build_report().get("compiler", "compiler unknown")),
        oner_fast=oner_fast.__version__,
        system=f"{platform.system()} {platform.release().split('-')[0]}",
        allocator=", ".join(f"{name}={os.environ[name]}" for name in _MALLOC_VARIABLES if os.environ.get(name)),
    )


@cache
def cache_bytes(device: str = "cpu") -> int:
    """Bytes of the GPU's L2, or of the first core's largest cache as Linux reports it; 32 MiB if unknown."""
    if device != "cpu":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 32 * 2**20
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)
