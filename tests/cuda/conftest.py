"""CUDA C++ without a GPU: nvcc compiles csrc/cuda, its own host code makes the launches, and the sm_80 PTX runs on the
CPU, with bounds, races and barriers checked."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import setuptools
import torch
from torch import Tensor

from oner_fast.benchmarks.gpuless import tools
from oner_fast.benchmarks.gpuless.ptx import Kernel

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
KERNELS = [
    "masked_gather", "gather_patches", "token_alignment", "mixup_info_nce", "short_attention",
    "short_attention_backward",
]  # fmt: skip
NUMBERS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}

I32, I64, F32, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


@cache
def structure(name: str) -> type[ctypes.Structure]:
    """A struct of csrc/cuda/launch.h, read from its text so that the tests follow it."""
    text = re.sub(r"//[^\n]*", "", (SOURCES / "launch.h").read_text(encoding="utf-8"))
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.S)
    assert body is not None, name
    fields: list[tuple[str, Any]] = []
    for line in body[1].split(";"):
        if not (line := " ".join(line.split())):
            continue
        kind, names = re.match(r"(?:const )?(\w+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        for each in names.split(","):
            of = Kept if kind == "Kept" else {"int32_t": I32, "int64_t": I64, "float": F32}.get(kind)
            fields.append((each.strip(" *"), POINTER if "*" in each or of is None else of))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Kept: Any = None
Kept = structure("Kept")


class Library:
    """One .cu as a shared library whose launches are emulated. `log` keeps the counters of the launches of a call."""

    def __init__(self, name: str, compiler: str) -> None:
        folder = self.build(name, compiler)
        self.library = ctypes.CDLL(str(folder / "kernels.so"))
        self.entries = entries((folder / f"{name}.ptx").read_text(encoding="utf-8"))
        self.kernels: dict[str, Kernel] = {}
        self.log: list[Any] = []
        self.shared: list[int] = []  # bytes of dynamic shared memory that each asked for
        self.settings: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.tensors: list[Tensor] = []
        signature = ctypes.CFUNCTYPE(I32, ctypes.c_char_p, POINTER, POINTER, POINTER, ctypes.c_uint64)
        self.launcher = signature(self.launch)
        self.library.oner_fast_test_launcher(self.launcher)

    @staticmethod
    def build(name: str, compiler: str) -> Path:
        runtime = Path(__file__).parent / "runtime.cpp"
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        sources = [*sorted(SOURCES.glob("*.cuh")), SOURCES / "launch.h", SOURCES / f"{name}.cu", runtime]
        # A CUDA build of torch brings a CUDA runtime of the same names, which `-Bsymbolic` leaves aside.
        flags = [
            "-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-lineinfo", "--cudart=none", "-Xlinker", "-Bsymbolic",
            "-gencode", "arch=compute_80,code=compute_80",
        ]  # fmt: skip
        told = " ".join([version, *flags]).encode()
        digest = hashlib.sha256(told + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        cached = Path(tempfile.gettempdir()) / f"oner-fast-cuda-{os.getuid()}" / f"{name}-{digest}"
        if cached.is_dir():
            return cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cached.parent))
        command = [
            compiler, *flags, "--keep", "--keep-dir", partial, "-I", ROOT / "csrc", SOURCES / f"{name}.cu", runtime,
            "-o", partial / "kernels.so",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        try:
            partial.rename(cached)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
        return cached

    def launch(self, name: bytes, grid: int, block: int, arguments: int, shared: int) -> int:
        """Run a kernel that the host code launches; an exception is raised after the host code returns."""
        try:
            kernel = self.kernel(name.decode())
            places = (POINTER * len(kernel.params)).from_address(arguments)
            given = [ctypes.string_at(place, p.size) for place, p in zip(places, kernel.params, strict=True)]
            sizes = [tuple((ctypes.c_uint32 * 3).from_address(at)) for at in (grid, block)]
            stats = kernel.launch(*sizes, given, shared=shared, tensors=self.tensors, **self.settings)
            self.log.append(stats)
            self.shared.append(shared)
            return 0
        except BaseException as error:
            self.failure = self.failure or error
            return 1

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            self.kernels[name] = Kernel(self.entries[name], name)
        return self.kernels[name]

    def call(self, function: str, fields: dict[str, Any], keep: Sequence[Tensor] = (), **settings: Any) -> None:
        """oner_fast_<function>(&struct, stream 0); tensors among the fields become pointers and may be touched."""
        struct = self.filled(function, fields)
        tensors = [value for value in fields.values() if isinstance(value, Tensor)]
        kept = fields.get("kept")
        if isinstance(kept, dict):
            tensors += [value for value in kept.values() if isinstance(value, Tensor)]
        self.tensors, self.settings, self.failure, self.log, self.shared = [*tensors, *keep], settings, None, [], []
        error = getattr(self.library, f"oner_fast_{function}")(ctypes.byref(struct), None)
        if self.failure is not None:
            raise self.failure
        assert error == 0, f"oner_fast_{function} returned the CUDA error {error}"

    def fill(self, function: str, **fields: Any) -> Any:
        """The struct of a call, after the library's oner_fast_<function> filled in what is its to decide."""
        struct = self.filled({"mixup_plan": "mixup_statistics"}[function], fields)
        getattr(self.library, f"oner_fast_{function}")(ctypes.byref(struct))
        return struct

    @staticmethod
    def kept(kept: Tensor, samples: int, cells: int, cu_seqlens: Tensor | None = None) -> dict[str, Any]:
        """The struct Kept, as the bindings fill it."""
        per_sample = kept.shape[1] if cu_seqlens is None else 0
        return dict(
            values=kept.contiguous(), starts=cu_seqlens, samples=samples, cells=cells, per_sample=per_sample,
            total=kept.numel(),
        )  # fmt: skip

    @staticmethod
    def poison(*shape: int, dtype: torch.dtype) -> Tensor:
        """A result that nothing was written to."""
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)

    @staticmethod
    def number(tensor: Tensor) -> int:
        """The Number of a tensor's dtype."""
        return NUMBERS[tensor.dtype]

    @staticmethod
    def filled(function: str, fields: dict[str, Any]) -> Any:
        name = "".join(word.capitalize() for word in function.split("_"))
        name = {"TokenAlignmentBackward": "TokenAlignment"}.get(name, name)
        struct = structure(name)()
        known = {field for field, _ in struct._fields_}
        assert set(fields) <= known, set(fields) - known
        for field, value in fields.items():
            setattr(struct, field, _plain(value))
        return struct


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return Kept(**{field: _plain(one) for field, one in value.items()})
    return value.data_ptr() if isinstance(value, Tensor) else value


def entries(ptx: str) -> dict[str, str]:
    """Each kernel as a PTX text of its own: all of them together would be parsed again for each."""
    starts = [m.start() for m in re.finditer(r"^(?:\.\w+ )*\.entry ", ptx, re.M)]
    head, found, tail = ptx[: starts[0]], {}, ""
    bodies = [ptx[a:b] for a, b in zip(starts, [*starts[1:], len(ptx)], strict=True)]
    for i, body in enumerate(bodies):
        end = body.index("\n}\n") + 3
        bodies[i], tail = body[:end], tail + body[end:]
    for body in bodies:
        found[re.search(r"\.entry (\S+?)\(", body)[1]] = head + body + tail  # type: ignore[index]
    return found


@cache
def library_of(name: str, compiler: str) -> Library:
    return Library(name, compiler)


@pytest.fixture(scope="session")
def library(compiler: str, needs: Callable[..., None]) -> Callable[[str], Library]:
    """The emulated library of a .cu by its name."""
    needs("g++")
    return lambda name: library_of(name, compiler)


@pytest.fixture(scope="session")
def compiler(needs: Callable[..., None]) -> str:
    """The path of nvcc."""
    needs("nvcc")
    return tools.find("nvcc") or ""


@pytest.fixture(scope="session")
def setup_names() -> Callable[[], dict[str, Any]]:
    """A function that returns the names of setup.py, without a build."""

    def read() -> dict[str, Any]:
        with patch.object(setuptools, "setup"), patch.object(sys, "argv", ["setup.py"]):
            return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")

    return read
