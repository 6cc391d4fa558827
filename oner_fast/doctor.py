"""`oner-fast doctor`: the installed packages, the hardware, and the implementation chosen for each op, with the reason.

Needs the standard library and torch alone. Optional packages are looked up without importing them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import oner_fast
from oner_fast import _cuda_extension, _extension
from oner_fast.remedies import install_command, install_extra_command

# Names of instruction sets in Linux's /proc/cpuinfo, for x86 and ARM.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve"),
)


def find_peer(module: str, distribution: str) -> str | None:
    """Version of an optional package ("?" if it states none), or None where it is not installed. Imports nothing."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def find_apex() -> tuple[str | None, str]:
    """Find NVIDIA's apex by its folders, since the package named apex on PyPI is another one."""
    remedy = "build it from github.com/NVIDIA/apex; 'pip install apex' is an unrelated package"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None, remedy
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    if any((folder / name).is_dir() for folder in folders for name in ("normalization", "multi_tensor_apply")):
        return find_peer("apex", "apex"), ""
    return None, f"a package named apex is installed, but it is not NVIDIA's; {remedy}"


def cpu_features() -> list[str]:
    """Instruction sets that matter here, from the compiled module or else from the kernel's list."""
    try:
        return list(importlib.import_module("oner_fast._native").cpu_features())
    except (ImportError, AttributeError):  # it is not built, damaged, or of other sources
        pass
    flags = (cpu_info("flags") or cpu_info("Features")).split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpu_info(name: str) -> str:
    """Linux's entry `name` for the first core; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _versions() -> Iterator[tuple[str, str]]:
    yield "oner_fast", f"{oner_fast.__version__} in {Path(oner_fast.__file__).parent}"
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    yield "system", platform.platform()


def _machine() -> Iterator[tuple[str, str]]:
    name = cpu_info("model name") or platform.machine()
    yield "CPU", f"{name}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "instruction sets", ", ".join(cpu_features()) or "none that matter here"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use" if torch.version.cuda else "none: this torch is a CPU build"
    else:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def _peers() -> Iterator[tuple[str, str]]:
    flash_attn = install_command("--no-build-isolation", "flash-attn>=2.7")  # its build imports torch
    for module, distribution, remedy in (
        ("triton", "triton", f"{install_extra_command('triton')} (GPU kernels; CUDA builds of torch bring it)"),
        ("flash_attn", "flash-attn", f"{flash_attn} (a CUDA GPU and its toolkit)"),
        ("xformers", "xformers", f"{install_extra_command('xformers')} (a CUDA GPU)"),
    ):
        yield distribution, find_peer(module, distribution) or f"not found: {remedy}"
    apex, remedy = find_apex()
    yield "apex", apex if apex else f"not found: {remedy}"


def _why_no_packer(report: dict[str, Any]) -> str:
    """Say why lists are packed in plain Python; empty where the compiled module packs them."""
    try:
        return (
            "" if hasattr(importlib.import_module("oner_fast._native"), "pack") else "it was built from other sources"
        )
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        return f"the compiled module cannot be imported: {error}"
    native = report.get("native", {})
    if not native.get("built"):
        return native.get("reason") or "the package was never built"
    built, this = str(report.get("python", "another version")), platform.python_version()
    if built.split(".")[:2] != this.split(".")[:2]:
        return f"it was compiled for Python {built}, and this is {this}"
    return "the compiled module was removed after the build"


def _extension_facts() -> Iterator[tuple[str, str]]:
    importlib.import_module("oner_fast.ops")
    state, report = _extension.status(), _extension.build_report()
    if state.loaded:
        try:
            kernels = f"{torch.ops.oner_fast.cpu_capability()} kernels in use"
        except (ValueError, RuntimeError) as error:  # RuntimeError from torch 2.15 on
            kernels = f"every call fails: {str(error).splitlines()[0]}"
        yield "compiled ops", f"loaded; {kernels}; {report.get('compiler', 'compiler unknown')}"
        if "oldest_torch" in report and "torch" in report:
            yield "built with", f"torch {report['torch']}; serves torch {report['oldest_torch']} and newer"
    else:
        yield "compiled ops", f"not in use: {state.reason}"
        yield "remedy", state.remedy
    if not (why := _why_no_packer(report)):
        yield "packer", "compiled"
    else:
        yield "packer", f"plain Python: {why}"
        if state.loaded:
            yield "remedy", _extension.remedy(report.get("native", {}).get("remedy", ""))
    cuda = _cuda_extension.status()
    if cuda.loaded:
        yield "CUDA C++", f"loaded; built for {report.get('cuda', {}).get('architectures', 'unknown GPUs')}"
    elif state.loaded:
        yield "CUDA C++", f"not in use: {cuda.reason}"
        if torch.version.cuda:
            yield "remedy", cuda.remedy


def _ops() -> Iterator[tuple[str, str]]:
    from oner_fast.ops.implementations import explain

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for choice in explain(device):
            yield f"{choice.op} ({device})", f"{choice.chosen or 'NOTHING'}: {choice.why}"
            for name, reasons in choice.others.items():
                yield "", f"not {name}: {'; '.join(reasons)}"


SECTIONS = {
    "Versions": _versions,
    "Machine": _machine,
    "Optional packages": _peers,
    "C++ extension": _extension_facts,
    "Implementation chosen for each op": _ops,
}


def report() -> str:
    """The whole report as plain text."""
    lines = []
    for title, rows in SECTIONS.items():
        lines.append(title)
        for name, value in rows():
            lines.extend(textwrap.wrap(value, 110, initial_indent=f"  {name:<24} ", subsequent_indent=" " * 29))
        lines.append("")
    lines.append("Force an implementation with implementation=NAME in a call, or with the environment variables")
    lines.append("ONER_FAST_IMPLEMENTATION (all ops) and ONER_FAST_<OP>_IMPLEMENTATION (one).")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run `oner-fast doctor`, which takes no arguments."""
    if any(argument in ("-h", "--help") for argument in argv):
        print(f"usage: oner-fast doctor\n\n{(__doc__ or '').strip()}")
        return 0
    if argv:
        print(f"oner-fast doctor takes no arguments, got {' '.join(argv)!r}", file=sys.stderr)
        return 2
    print(report())
    return 0
