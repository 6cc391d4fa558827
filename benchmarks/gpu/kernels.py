"""List every GPU kernel: Triton's compilations and the CUDA C++ sources."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import oner_fast.kernels
from oner_fast.benchmarks.gpu.machine_code import Figures, of_cubin
from oner_fast.benchmarks.gpuless import tools
from oner_fast.kernels.launch import Compilation

SOURCES = Path(oner_fast.kernels.__file__).resolve().parents[1] / "csrc"


def compilations() -> list[Compilation]:
    """List the compilations of each module of `oner_fast.kernels`, by name; ValueError where a name occurs twice."""
    found: dict[str, Compilation] = {}
    for module in pkgutil.iter_modules(oner_fast.kernels.__path__, "oner_fast.kernels."):
        for one in getattr(importlib.import_module(module.name), "compilations", list)():
            if one.name in found:
                raise ValueError(f"two kernels are named {one.name!r}")
            found[one.name] = one
    return [found[name] for name in sorted(found)]


def first_of_each_kernel() -> list[Compilation]:
    """List one compilation of every kernel: the first of its specialisations by name."""
    found: dict[int, Compilation] = {}
    for one in compilations():
        found.setdefault(id(one.kernel), one)
    return list(found.values())


def cuda_sources() -> list[Path]:
    """List the CUDA C++ files that hold kernels, which do not depend on torch."""
    return [path for path in sorted((SOURCES / "cuda").rglob("*.cu")) if "ATen/" not in path.read_text("utf-8")]


def compile_cuda(source: Path, target: str) -> list[Figures]:
    """Compile a CUDA C++ file and list its kernels by name. Raises FileNotFoundError without nvcc."""
    if (nvcc := tools.find("nvcc")) is None:
        raise FileNotFoundError("nvcc was not found")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-cubin", f"-arch={target}", "-std=c++17", "-O3", "-I", str(SOURCES), str(source)]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split())[:300]
            return [Figures(f"{source.stem} (CUDA C++)", target, error=reason)]
        found = of_cubin(cubin.read_bytes(), target)
    readable = demangled(list(found))
    named = [
        Figures(f"{source.stem} (CUDA C++) {readable[name]}", target, one.registers, one.local, one.shared, 0,
                one.matrix, one.asynchronous)
        for name, one in found.items()
    ]  # fmt: skip
    return sorted(named, key=lambda one: one.name)


def demangled(names: list[str]) -> dict[str, str]:
    """Remove namespaces and arguments from C++ names; return them unchanged where c++filt is missing."""
    if (tool := shutil.which("c++filt")) is None or not names:
        return {name: name for name in names}
    said = subprocess.run([tool, "-p", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    namespaces = re.compile(r"^void |\w+::(?=\w|\()|\(anonymous namespace\)::")
    return {name: namespaces.sub("", one) for name, one in zip(names, said, strict=True)}
