"""`oner-fast bench gpu-resources`: the machine code of every GPU kernel, as Markdown; equal kernels give an equal file.

No GPU is needed: the command counts the compilers' output and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from oner_fast.benchmarks.gpu.kernels import compilations, compile_cuda, cuda_sources, first_of_each_kernel
from oner_fast.benchmarks.gpu.machine_code import TARGETS, Figures, compile_triton, versions
from oner_fast.benchmarks.gpuless import tools
from oner_fast.benchmarks.gpuless.architectures import GATED
from oner_fast.kernels.launch import REFERENCE_ARCHITECTURE
from oner_fast.kernels.tile_overrides import tiles_of

DEFAULT_FILE = Path("benchmarks/results/gpu_resources.md")
COMMAND = "oner-fast bench gpu-resources"
CUDA = "\n## CUDA C++\n"
Kept = dict[tuple[str, str], str]  # lines of the table by name and target
HEAD = "| kernel | target | registers | spills | shared KiB | warps | occupancy | tensor-core | async copies |"


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    made = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    made.add_argument("--out", type=Path, default=DEFAULT_FILE, help=f"the Markdown file ({DEFAULT_FILE})")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    made.add_argument(
        "--kernels",
        nargs="+",
        metavar="PREFIX",
        default=None,
        help="compile only the Triton kernels whose names begin so, and keep the file's other lines",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Compile all and write the report; returns 1 where a kernel has a problem on a gated GPU."""
    made = parser()
    options = made.parse_args(argv)
    listed = compilations()
    kept: Kept = {}
    if options.kernels is not None:
        try:
            kept = kept_rows(options.out, tuple(options.kernels))
        except (OSError, ValueError) as error:
            made.error(f"--kernels: {error}; run the command without it")
    todo = [one for one in tasks() if one not in kept]
    if not todo:
        made.error(f"--kernels: no kernel's name begins with {' or '.join(options.kernels)}")
    with _compilers(options.jobs) as pool:
        triton = list(pool.map(compile_named, *zip(*todo, strict=True), chunksize=4))
        sources = _cuda_tasks() if options.kernels is None else []
        cuda = [one for each in pool.map(compile_cuda, *zip(*sources, strict=True)) for one in each] if sources else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.kernels is None:
        text = markdown(triton, cuda)
    else:
        of_cuda = options.out.read_text(encoding="utf-8").partition(CUDA)[2]
        text = markdown(triton, [], kept).partition(CUDA)[0] + CUDA + of_cuda
    options.out.write_text(text, encoding="utf-8")
    print(f"wrote {options.out}")
    needed = {one.name: one.tensor_cores for one in listed}
    wrong = [
        f"{one.name} on {one.target}: {problem}"
        for one in (*triton, *cuda)
        if one.error or (one.target in GATED and not _never_runs(one))
        for problem in one.problems(needed.get(one.name, False))
    ]
    for line in wrong:
        print(f"{COMMAND}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _never_runs(one: Figures) -> bool:
    """Return whether no GPU of the target takes the kernel: those with 99 KiB have no room for its rows."""
    return one.name.startswith("short_attention_backward ") and one.target in ("sm_86", "sm_89")


def kept_rows(path: Path, compiled: tuple[str, ...]) -> Kept:
    """Read the lines of the Triton kernels whose names do not begin with one of `compiled`.

    Lines of kernels that are no more are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it was made by other compilers.
    """
    text = path.read_text(encoding="utf-8").partition(CUDA)[0]
    if f"{versions()}." not in text:
        raise ValueError(f"{path} was not made by {versions()}")
    known = set(tasks())
    lines = (line for line in text.splitlines() if line.startswith("| ") and line != HEAD)
    found = {(cells[1].strip(), cells[2].strip()): line for line in lines if (cells := line.split("|"))}
    return {key: line for key, line in found.items() if key in known and not key[0].startswith(compiled)}


def tasks() -> list[tuple[str, str]]:
    """List (name, target) of everything in the report.

    That is each specialisation for the gated targets, and one specialisation of each kernel for the others.
    """
    first = {one.name for one in first_of_each_kernel()}
    return [
        (one.name, target) for one in compilations() for target in TARGETS if target in GATED or one.name in first
    ]  # fmt: skip


def compile_all(named: Sequence[tuple[str, str]], jobs: int) -> dict[tuple[str, str], Figures]:
    """Compile some of `tasks`, several at a time."""
    with _compilers(jobs) as pool:
        return dict(zip(named, pool.map(compile_named, *zip(*named, strict=True)), strict=True))


def _compilers(jobs: int) -> ProcessPoolExecutor:
    """Make a pool of spawned processes, which find the kernels that they compile by name.

    Torch's threads do not survive a fork, and kernels cannot be pickled.
    """
    return ProcessPoolExecutor(jobs, get_context("spawn"))


def compile_named(name: str, target: str) -> Figures:
    """Compile the kernel of that name with the tiles of the target."""
    with tiles_of(int(target.removeprefix("sm_")) if target.startswith("sm_") else REFERENCE_ARCHITECTURE):
        return compile_triton(next(one for one in compilations() if one.name == name), target)


def _cuda_tasks() -> list[tuple[Path, str]]:
    if tools.find("nvcc") is None:
        return []
    return [(source, target) for source in cuda_sources() for target in TARGETS if target.startswith("sm_")]


def markdown(triton: Sequence[Figures], cuda: Sequence[Figures], kept: Kept | None = None) -> str:
    """Format the whole report; `kept` are lines of further Triton kernels."""
    lines = [
        "# What the GPU kernels compile to",
        "",
        f"Written by `{COMMAND}`, never by hand. Nothing here was measured: these are counts of machine code, made",
        "without a GPU. None may spill on sm_80 (A100), sm_86 (A10, RTX 30), sm_89 (L4, RTX 40) and sm_90 (H100), but",
        "for short_attention_backward, which sm_86 and sm_89 never run; one specialisation of each on sm_100 and",
        "gfx942 shows that it compiles there.",
        "",
        "Registers are of a thread, shared memory is of a block, occupancy is the share of a multiprocessor's warps",
        "that can be resident. Spills, tensor-core instructions and asynchronous copies are counted in the code, not",
        "as executed.",
        "",
        "## Triton",
        "",
        f"{versions()}.",
        "",
        *table(triton, kept),
    ]
    lines += ["", "## CUDA C++", ""]
    if cuda:
        lines += [f"{nvcc_version()}. Block sizes and dynamic shared memory are the launch's.", "", *table(cuda)]
    else:
        lines += ["Left out: nvcc was not found."]
    return "\n".join(lines) + "\n"


def table(figures: Sequence[Figures], kept: Kept | None = None) -> list[str]:
    """Format a table, sorted by name and then by the order of the targets."""
    rows = {**(kept or {}), **{(one.name, one.target): row(one) for one in figures}}
    ordered = sorted(rows, key=lambda key: (key[0], TARGETS.index(key[1])))
    return [HEAD, "|---" * (HEAD.count("|") - 1) + "|", *(rows[key] for key in ordered)]


def row(one: Figures) -> str:
    """Format one line of the table."""
    if one.error:
        return f"| {one.name} | {one.target} | {one.error} | | | | | | |"
    occupied = "" if one.occupancy is None else f"{one.occupancy:.0%}"
    warps = str(one.warps or "")
    shared = f"{one.shared / 1024:.1f}"
    return (
        f"| {one.name} | {one.target} | {one.registers} | {one.local} | {shared} | {warps} | {occupied} "
        f"| {one.matrix} | {one.asynchronous} |"
    )


def nvcc_version() -> str:
    """Version of the compiler of the CUDA C++ part."""
    said = subprocess.run(
        [tools.find("nvcc") or "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    release = re.search(r"V(\d[\d.]*)", said)
    return f"nvcc {release[1] if release else 'unknown'}"
