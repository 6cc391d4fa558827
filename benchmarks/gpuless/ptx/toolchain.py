"""Compile the C++ of a kernel, and keep what was compiled.

Environment: `ONER_FAST_PTX_CACHE` names the folder of compiled kernels (default: one in the temporary directory),
`ONER_FAST_PTX_OPTIMISATION` the compiler's level (default: -O0, which builds twice as fast as -O1 and runs about 1.5
times slower), `CXX` the compiler (default: g++).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from oner_fast.benchmarks.gpuless import tools
from oner_fast.benchmarks.gpuless.ptx.parse import PtxError

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-w"]


def cache_folder() -> Path:
    """Return the folder of compiled kernels, which is made where it is not there.

    Raises:
        PtxError: another user owns the folder, whose files would be executed.
    """
    named = os.environ.get("ONER_FAST_PTX_CACHE")
    path = Path(named) if named else Path(tempfile.gettempdir()) / f"oner-fast-ptx-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PtxError(f"{path} belongs to another user; name another folder in ONER_FAST_PTX_CACHE")
    return path


def optimisation() -> str:
    """Return the compiler's level of optimisation for kernels."""
    return os.environ.get("ONER_FAST_PTX_OPTIMISATION", "-O0")


def build(source: str, name: str) -> Path:
    """Compile a kernel's C++ and link it with runtime.cpp; return the shared library.

    Raises:
        PtxError: there is no compiler, or it refused the source.
    """
    runtime = _compile_object((HERE / "runtime.cpp").read_text(encoding="utf-8"), "-O3", "runtime")
    kernel = _compile_object(source, optimisation(), re.sub(r"\W", "_", name)[:40])
    target = cache_folder() / f"{kernel.stem}-{runtime.stem[-8:]}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.so")
        subprocess.run([_compiler(), "-shared", str(kernel), str(runtime), "-o", str(partial)], check=True)
        os.replace(partial, target)
    return target


def _compile_object(text: str, level: str, name: str) -> Path:
    """Return the object file of a source, from the cache when the same source was compiled before."""
    header = (HERE / "runtime.h").read_text(encoding="utf-8")
    facts = "\0".join([text, header, level, _compiler(), _cpu_features(), *FLAGS])
    target = cache_folder() / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.o"
    if not target.exists():
        source, partial = (target.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".cpp", ".o"))
        source.write_text(text, encoding="utf-8")
        command = [_compiler(), *FLAGS, level, f"-I{HERE}", "-c", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PtxError(f"{source} does not compile:\n{done.stderr[:3000]}")
        os.replace(partial, target)
        source.unlink()
    return target


def _compiler() -> str:
    found = tools.find("g++")
    if found is None:
        wanted = os.environ.get("CXX") or "g++"
        raise PtxError(f"{wanted} not found: a C++17 compiler with _Float16 (g++ 12 or later) is needed; CXX names one")
    return found


def _cpu_features() -> str:
    """Return the features that -march=native depends on, so that code compiled for another processor is not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
