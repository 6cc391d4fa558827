"""Build the C++ extension with CMake and ninja; where a tool is missing, install the pure-Python package alone.

The reason and its remedy are then written to `oner_fast/_build.json`. `oner_fast` warns at the first call that the
extension would have handled; `oner-fast doctor` always reports it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import TORCH, is_too_old, torch_folder  # noqa: E402

EDITABLE = "editable_wheel" in sys.argv
ARCHITECTURES = ["80", "86", "89", "90", "100"]  # machine code for each, and PTX of the last


class Missing(Exception):
    """A missing requirement of the build, and what to do before the package is installed again.

    The remedy is empty for what the command of `oner_fast.remedies.build_command` installs.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def find_torch() -> dict[str, Any]:
    """Find torch's location and build settings, without importing it: an isolated build could not."""
    folder = torch_folder()
    if folder is None:
        raise Missing("no torch was found while the package was built", "install torch")
    if is_too_old(folder):
        raise Missing(f"the torch in {folder.parent} is older than {TORCH}", f"pip install '{TORCH}'")
    version = runpy.run_path(str(folder / "version.py"))
    return {
        "version": str(version["__version__"]),
        "include": [str(folder / "include"), str(folder / "include/torch/csrc/api/include")],
        "library": str(folder / "lib"),
        "cuda": version.get("cuda"),
    }


def oldest_torch() -> str:
    """Return the oldest torch that pyproject.toml promises, such as "2.10", which the ops are built for."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(one.removeprefix("torch>=") for one in dependencies if one.startswith("torch>="))


def target_version(torch_version: str) -> str:
    """Write a version such as "2.10" as TORCH_TARGET_VERSION: a byte for each part."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return f"0x{major:02x}{minor:02x}{0:012x}ULL"


def find_tool(name: str) -> str:
    """A build tool, first in the environment that builds, then on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Missing(f"{name} was not found")
    return found


def switch(name: str) -> bool | None:
    """Read an environment variable that turns a part on (1) or off (0); None where it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return bool(int(value)) if value else None


def find_compiler() -> tuple[list[str], list[str], str]:
    """Find what starts the C++ compiler, the compiler (CXX, or c++, g++, clang++), and what it says it is.

    As for make, CXX may hold arguments after the compiler, and a program that starts it ("ccache g++").
    """
    asked = os.environ.get("CXX", "").strip()
    for command in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            said = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True, check=False)
            if said.returncode == 0 and said.stdout:
                first = next((i for i, word in enumerate(command[1:]) if word.startswith("-")), len(command) - 1)
                words = [path, *command[1:]]
                return words[:first], words[first:], said.stdout.splitlines()[0]
    what = f"the C++ compiler CXX={asked} was not found" if asked else "no C++ compiler was found"
    raise Missing(what, "install one (for example: apt install g++)")


def find_cuda(torch_info: dict[str, Any]) -> tuple[str | None, str]:
    """nvcc and, where it is not used, why."""
    if switch("ONER_FAST_CUDA") is False:
        return None, "ONER_FAST_CUDA=0 left it out, as wheels do"
    if not torch_info["cuda"]:
        return None, "the torch that it was built with has no CUDA"
    if os.environ.get("ONER_FAST_SANITIZE"):
        return None, "sanitizers watch the CPU's code"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None, f"nvcc was not found (torch has CUDA {torch_info['cuda']}); install that toolkit or set CUDA_HOME"
    release = cuda_release(nvcc)
    if release is None:
        return None, f"{nvcc} --version did not say which release it is"
    if release.split(".")[0] != torch_info["cuda"].split(".")[0]:
        return None, (
            f"{nvcc} is CUDA {release} but torch has CUDA {torch_info['cuda']}; install that toolkit or set CUDA_HOME "
            "to it"
        )
    return nvcc, ""


def cuda_release(nvcc: str) -> str | None:
    """Return the release of an nvcc, such as "13.0"; None where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    return release[1] if release else None


def cuda_architectures(nvcc: str) -> str:
    """Return CMake's list of architectures: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), or all of ours that nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if asked:
        each = [one for one in asked.split(";") if one]
        return ";".join(
            one.removesuffix("+PTX").replace(".", "") + ("" if one.endswith("+PTX") else "-real") for one in each
        )
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    known = [one for one in ARCHITECTURES if f"compute_{one}" in said] or ARCHITECTURES[:1]
    return ";".join([*(f"{one}-real" for one in known[:-1]), known[-1]])


def find_pybind11() -> list[str]:
    """Header folders of Python and pybind11."""
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        raise Missing(
            f"Python.h was not found in {include}",
            "install Python's development headers (for example: apt install python3-dev)",
        )
    if importlib.util.find_spec("pybind11") is None:
        raise Missing("pybind11 was not found")
    import pybind11

    return [include, pybind11.get_include()]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process builds in this folder: two would remove each other's files."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CMakeBuild(build_ext):
    """Both libraries by one CMake project; on failure neither, and the reason in _build.json."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.package = ROOT / "oner_fast" if in_place else Path(self.build_lib).resolve() / "oner_fast"
        self.package.mkdir(parents=True, exist_ok=True)
        required = switch("ONER_FAST_REQUIRED"), switch("ONER_FAST_CUDA")
        self.libraries: list[Path] = []
        report: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
        with contextlib.ExitStack() as stack:
            self.build_and_install(report, stack, *required)

    def build_and_install(
        self, report: dict[str, Any], stack: contextlib.ExitStack, required: bool | None, cuda: bool | None
    ) -> None:
        try:
            stack.enter_context(alone())
            self.build_all(report)
        except Missing as missing:
            report["extension"] = {"built": False, "reason": missing.reason, "remedy": missing.remedy}
        except Exception as error:  # a build must never stop an install
            report["extension"] = {
                "built": False,
                "reason": f"{type(error).__name__}: {error}",
                "remedy": "correct it (pip's option -v shows the build)",
            }
        if not report["extension"]["built"]:
            report["native"] = dict(report["extension"])
            self.distribution.ext_modules = []
        for part in ("extension", "native"):
            if not report[part]["built"]:
                print(f"oner_fast: {part} not built: {report[part]['reason']}", file=sys.stderr)
                print("oner_fast: 'oner-fast doctor' names the remedy", file=sys.stderr)
        if required and not report["extension"]["built"]:
            raise SystemExit(f"ONER_FAST_REQUIRED=1, and the extension is not built: {report['extension']['reason']}")
        if required and cuda and not report["cuda"]["built"]:
            raise SystemExit(f"ONER_FAST_CUDA=1, and CUDA C++ is not built: {report['cuda']['reason']}")
        self.install_libraries(report)

    def install_libraries(self, report: dict[str, Any]) -> None:
        """Put what was built, and its report, in the place of an earlier build, which served until now."""
        for old in {*self.built()} - {self.package / library.name for library in self.libraries}:
            old.unlink()
        for library in self.libraries:
            # Written beside and renamed: a process that has the old file mapped keeps it.
            partial = self.package / f".{library.name}.partial"
            shutil.copy2(library, partial)
            partial.replace(self.package / library.name)
        partial = self.package / "._build.json.partial"
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.package / "_build.json")

    def build_all(self, report: dict[str, Any]) -> None:
        torch_info = find_torch()
        launcher, compiler, compiler_version = find_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        nvcc, no_cuda = find_cuda(torch_info)
        report.update(
            torch=torch_info["version"],
            oldest_torch=oldest_torch(),
            compiler=compiler_version,
            cuda={"built": nvcc is not None, "reason": no_cuda},
        )
        native: dict[str, Any] = {"built": True, "reason": "", "remedy": ""}
        headers: list[str] = []
        try:
            headers = find_pybind11()
        except Missing as missing:
            native = {"built": False, "reason": missing.reason, "remedy": missing.remedy}
        settings = {
            "CMAKE_CXX_COMPILER": ";".join(compiler),
            "CMAKE_CXX_COMPILER_LAUNCHER": ";".join(launcher or [os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", "")]),
            "CMAKE_MAKE_PROGRAM": ninja,
            "TORCH_INCLUDE_DIRS": ";".join(torch_info["include"]),
            "TORCH_LIBRARY_DIR": torch_info["library"],
            "TORCH_TARGET_VERSION": target_version(report["oldest_torch"]),
            "PYTHON_INCLUDE_DIRS": ";".join(headers),
            "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX") or ".so",
            "ONER_FAST_NATIVE": "ON" if native["built"] else "OFF",
            "ONER_FAST_CUDA": "ON" if nvcc else "OFF",
            "ONER_FAST_SANITIZE": os.environ.get("ONER_FAST_SANITIZE", ""),
            "ONER_FAST_WERROR": "ON" if switch("ONER_FAST_WERROR") else "OFF",
        }
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            settings["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures(nvcc)
            report["cuda"].update(architectures=settings["CMAKE_CUDA_ARCHITECTURES"], version=cuda_release(nvcc))
        flags = [os.environ.get(name, "") for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS")]  # CMake keeps the first
        facts = [report["torch"], compiler_version, sys.version, *flags]
        try:
            output = self.compile(cmake, settings, facts)
        except Missing as missing:
            if not nvcc:
                raise
            # The ops of the CPU are worth having without those of the GPU.
            report["cuda"] = {"built": False, "reason": missing.reason}
            output = self.compile(cmake, {**settings, "ONER_FAST_CUDA": "OFF"}, facts)
        libraries = [output / "_C.so"]
        if report["cuda"]["built"]:
            libraries.append(output / "_C_cuda.so")
        if native["built"]:
            libraries.extend(output.glob("_native*"))
        self.libraries = libraries
        report["extension"] = {"built": True, "reason": "", "remedy": ""}
        report["native"] = native

    def compile(self, cmake: str, settings: dict[str, str], facts: list[str]) -> Path:
        """Configure and build; the folder of the libraries."""
        # A cache made with another torch, Python or compiler is worth nothing: the folder belongs to one set of facts.
        digest = hashlib.sha256(json.dumps([settings, *facts], sort_keys=True).encode()).hexdigest()
        folder = ROOT / "build" / ("sanitize" if settings["ONER_FAST_SANITIZE"] else "cmake")
        key = folder / "facts.sha256"
        if not key.exists() or key.read_text() != digest:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / "out"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not (jobs.isdecimal() and int(jobs)):
            raise Missing(f"MAX_JOBS must be a number of at least 1, got {jobs!r}", "correct it")
        arguments = [f"-D{name}={value}" for name, value in {**settings, "ONER_FAST_OUTPUT": str(output)}.items()]
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments]
        try:
            self.call(configure)
        except Missing:
            shutil.rmtree(folder, ignore_errors=True)
            self.call(configure)
        key.write_text(digest)
        self.call([cmake, "--build", str(folder), "--parallel", jobs])
        return output

    def call(self, command: list[str]) -> None:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
        print(done.stdout, flush=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines()[
                -3:
            ]
            step = "compiling" if "--build" in command else "configuring with CMake"
            raise Missing(
                f"{step} failed: {' | '.join(line.strip() for line in errors[:3])}",
                "correct it (pip's option -v shows the whole build)",
            )

    def built(self) -> list[Path]:
        """List what a build of this Python left; the packer of another Python stays."""
        native = f"_native{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
        names = {"_C.so", "_C_cuda.so", native, "_native.so", "_build.json"}
        return [self.package / name for name in sorted(names) if (self.package / name).exists()]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built()] if hasattr(self, "package") else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [
            str(path.relative_to(ROOT))
            for pattern in ("CMakeLists.txt", "csrc/**/*.*")
            for path in sorted(ROOT.glob(pattern))
        ]


class Wheel(bdist_wheel):
    """A platform wheel when the extension is in it, py3-none-any when it is not."""

    def run(self) -> None:
        build_lib = self.get_finalized_command("build").build_lib
        shutil.rmtree(build_lib, ignore_errors=True)  # files of an earlier build would be packed too
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def package_root() -> str:
    """Return the folder in which to look for packages: the repository root; for an editable install, `.editable`.

    `.editable` holds the package alone and goes on the path. Type checkers follow it, and neither `kernels` nor `train`
    is importable as a package of its own.
    """
    if not EDITABLE:
        return "."
    folder = ROOT / ".editable"
    folder.mkdir(exist_ok=True)
    link = folder / "oner_fast"
    if not link.is_symlink():
        link.symlink_to(Path("..") / "oner_fast", target_is_directory=True)
    return folder.name


where = package_root()
setup(
    packages=find_packages(where, include=["oner_fast*"]),
    package_dir={"": where} if where != "." else {},
    package_data={
        "oner_fast": ["py.typed"],
        "oner_fast.benchmarks.gpuless.ptx": ["runtime.cpp", "runtime.h"],
        "oner_fast.ablation": ["*.j2"],
        "oner_fast.benchmarks.page": ["*.j2"],
        "oner_fast.explorer": ["*.css", "*.j2", "*.js"],
        "oner_fast.kernels": ["configurations/*.json"],
        "oner_fast.report": ["*.j2"],
    },
    ext_modules=[Extension("oner_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
