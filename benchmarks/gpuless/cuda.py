"""Run CUDA C++ kernels on CPU tensors: `nvcc -ptx`, then `ptx`.

    from oner_fast.benchmarks.gpuless import cuda
    module = cuda.Module("softmax.cu")                   # a path, or the source text itself
    stats = module["softmax"].launch(grid, block, [x, y, 128, 0.5], shared=4096)

The .cu must not include torch: keep kernels in a separate .cu or .cuh and bind them elsewhere. Templates need an
explicit instantiation. Parameters are tensors, numbers, None, or bytes for structures. No GPU and no driver is needed.
The docstring of `ptx` lists the faults that are caught and those that are not. Messages name the line of the .cu file.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks.gpuless import tools
from oner_fast.benchmarks.gpuless.ptx import Kernel


class NvccError(Exception):
    """nvcc is missing or refused the source."""


def compile_ptx(source: str | Path, architecture: str = "compute_80", flags: Sequence[str] = ()) -> str:
    """Return the PTX of a .cu file, or of source text (anything with a line break).

    Raises:
        NvccError: nvcc is missing or refused the source.
    """
    nvcc = tools.find("nvcc")
    if nvcc is None:
        raise NvccError("nvcc was not found")
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "kernel.cu", Path(folder) / "out.ptx"
        if "\n" in str(source):
            path.write_text(str(source), encoding="utf-8")
        else:
            path = Path(source)
        command = [nvcc, "-ptx", f"-arch={architecture}", "-lineinfo", "-std=c++17", *flags, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NvccError(f"{path.name}: {done.stderr[:4000]}")
        return out.read_text(encoding="utf-8")


class Module:
    """The kernels of one .cu. `module["name"]` translates a kernel when it is first asked for.

    Args:
        source, architecture, flags: those of `compile_ptx`.

    Raises:
        NvccError: nvcc is missing or refused the source.
    """

    def __init__(self, source: str | Path, architecture: str = "compute_80", flags: Sequence[str] = ()) -> None:
        self.ptx = compile_ptx(source, architecture, flags)
        self._kernels: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = Kernel(self.ptx, name)
        return self._kernels[name]
