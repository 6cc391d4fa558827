"""Find the programs and packages that the checkers need. Nothing is imported to find them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

PACKAGES = ("triton", "numpy", "ml_dtypes")
TRITON_PROGRAMS = ("ptxas", "cuobjdump", "nvdisasm")  # Triton's wheel for Linux brings them

# The tools that each checker needs.
FOR_INTERPRETER = ("triton", "numpy", "ml_dtypes")
FOR_AOT = ("triton", "ptxas", "cuobjdump", "nvdisasm")
FOR_EMULATE = ("triton", "ptxas", "g++")
FOR_CUDA = ("nvcc", "g++")


def find(tool: str) -> str | None:
    """Return the path of a program or package, or None where it is missing.

    `g++` stands for the compiler that `CXX` names, if it names one. `nvcc` is looked for in `$CUDA_HOME/bin` if that
    variable is set, and on `PATH` otherwise.
    """
    if tool in PACKAGES:
        spec = importlib.util.find_spec(tool)
        return None if spec is None else spec.origin
    if tool in TRITON_PROGRAMS:
        package = find("triton")
        program = None if package is None else Path(package).parent / "backends" / "nvidia" / "bin" / tool
        return str(program) if program is not None and program.exists() else None
    if tool == "nvcc" and (home := os.environ.get("CUDA_HOME")):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which(os.environ.get("CXX") or tool if tool == "g++" else tool)


def missing(*tools: str) -> list[str]:
    """Return the names of the missing tools, in the given order; the compiler has the name in `CXX`."""
    cxx = os.environ.get("CXX")
    return [cxx if tool == "g++" and cxx else tool for tool in tools if find(tool) is None]
