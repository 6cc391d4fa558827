"""`oner-fast bench gpu-peers`: compare GPU kernels of ours, other libraries and torch.compile on an emulated A100.

No GPU is needed, and nothing is measured. The compiled kernels run on the CPU; their bytes and instructions are
counted, forward and backward together, after their results have been compared with float64. This needs Triton and a
C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.gpu.contest import CASES, contestants
from oner_fast.benchmarks.gpuless import estimate as model
from oner_fast.benchmarks.gpuless import tools

COMMAND = "oner-fast bench gpu-peers"
DEFAULT_FILE = Path("benchmarks/results/gpu_peers.md")
PACKAGES = ("memeff==0.3.1", "inf-cl==1.2.1", "flash-attention-triton==0.1.1")
HEAD = (
    "| who | error | MB | of the ideal | eager MB | MB of sectors | thousand instructions | tensor MFLOP "
    "| bank conflicts | kernels | eager operations | estimate, +-30 %: us, bound |"
)
FLOPS_OF_INSTRUCTION = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Entry:
    """Result of one contestant: counts and error from `contest.run`, or the reason why there are none."""

    workload: str
    name: str
    found: dict[str, Any]
    reason: str = ""


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    made = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    made.add_argument("--out", type=Path, default=DEFAULT_FILE, help=f"the Markdown file ({DEFAULT_FILE})")
    made.add_argument(
        "--peers",
        type=Path,
        default=Path("runs/peers"),
        help="folder of the other libraries, installed if missing",
    )
    made.add_argument("--op", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="contestants at a time")
    return made


def main(argv: Sequence[str]) -> int:
    """Run every contestant and write the table.

    Returns 1 if our kernel is wrong or cannot run, 2 if a tool is missing.
    """
    options = parser().parse_args(argv)
    if absent := tools.missing(*tools.FOR_EMULATE):
        print(f"{COMMAND}: kernels cannot be emulated without {', '.join(absent)}", file=sys.stderr)
        return 2
    install(options.peers)
    tasks = [(op, name, off) for op in options.op for name, off in contestants(op).items()]
    with ThreadPoolExecutor(options.jobs) as pool:
        entries = list(pool.map(lambda task: _enter(task[0], task[1], task[2], options.peers), tasks))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(markdown(entries), encoding="utf-8")
    print(f"wrote {options.out}")
    for one in entries:
        if one.reason:
            print(f"{COMMAND}: {one.workload}: {one.name}: {one.reason}", file=sys.stderr)
    return int(any(one.reason for one in entries if one.name == OURS))


def install(folder: Path) -> None:
    """Install the other libraries into a folder of their own, without their dependencies."""
    if not all((folder / f"{package.split('==')[0].replace('-', '_')}").is_dir() for package in PACKAGES):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True)


def _enter(workload: str, name: str, unchecked: bool, peers: Path) -> Entry:
    switches = ["-O"] if unchecked else []
    command = [sys.executable, *switches, "-m", "oner_fast.benchmarks.gpu.contest", workload, name, str(peers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{workload}: {name}", flush=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        named = [line for line in said if re.match(r"[\w.]+(Error|Fault|Unavailable|Exception)\b", line)]
        return Entry(workload, name, {}, (named or said)[-1][:200])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if not found["error"] <= found["allowed"]:
        return Entry(workload, name, {}, f"wrong: relative error {found['error']:.2g}, allowed {found['allowed']:.2g}")
    return Entry(workload, name, found)


def markdown(entries: Sequence[Entry]) -> str:
    """Format the whole report."""
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    lines = [
        "# The GPU kernels beside others, on an emulated A100",
        "",
        f"Written by `{COMMAND}`, never by hand. **Nothing here was measured**: the kernels' compiled sm_80 code ran",
        "on a CPU and was counted, forward and backward together, once the results had been compared with float64.",
        "What cannot run or is wrong has no figures.",
        "",
        "* MB: the sectors that each kernel reads and writes, once a kernel, and the tensors of eager PyTorch",
        "  operations between kernels (their part: eager MB): what crosses the bus where no data stays in L2 between",
        "  kernels. The ideal reads every input once and writes every output once, in forward and in backward.",
        "* MB of sectors counts every request of a warp, kernels alone; so do instructions (of warps), tensor MFLOP,",
        "  and bank conflicts (wavefronts of shared memory beyond the ideal).",
        "* torch.compile: the Triton kernels that inductor writes for an A100, its first configuration of each.",
        "* estimate: the busiest of memory (1.7 TB/s), tensor cores (73 % of 312 TFLOP/s) and issue (90 % of 4 warp",
        "  instructions a cycle and multiprocessor at 1.41 GHz), from these counts and without launches. **An",
        "  estimate, +-30 %, no measurement**, and these shapes do not fill the GPU: good for comparison alone.",
        "",
        f"{installed}.",
    ]
    for workload, make in CASES.items():
        of_workload = [one for one in entries if one.workload == workload]
        if not of_workload:
            continue
        case = make()
        lines += ["", f"## {workload}: {case.shape}, {str(case.dtype).removeprefix('torch.')}", ""]
        lines += [f"Ideal: {case.bytes / 1e6:.2f} MB.", "", HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
        lines += [row(one, case.bytes) for one in of_workload if not one.reason]
        lines += ["", *(f"* {one.name}: {one.reason}" for one in of_workload if one.reason)]
    return "\n".join(lines).rstrip() + "\n"


def row(one: Entry, ideal: float) -> str:
    """Format one line of a table."""
    found = one.found
    name = f"**{one.name}**" if one.name == OURS else one.name
    cells = [
        name, f"{found['error']:.1e}", f"{found['dram'] / 1e6:.2f}", f"{found['dram'] / ideal:.2f}x",
        f"{found['eager'] / 1e6:.2f}", f"{found['sectors'] / 1e6:.2f}", f"{found['instructions'] / 1e3:.0f}",
        f"{found['tensor_flops'] / 1e6:.1f}", str(found["conflicts"]), str(found["launches"]),
        str(found["operations"]), estimate(found),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def estimate(found: dict[str, Any]) -> str:
    """Estimate the microseconds on an A100 by the constants of `gpuless.estimate`, and name the bound; +-30 %."""
    chip = model.CHIPS["A100"]
    quarters = 4 * chip.sms * chip.hertz
    seconds = {
        "memory": found["dram"] / chip.bytes_per_second,
        "tensor cores": found["tensor_flops"] / FLOPS_OF_INSTRUCTION * chip.hmma / quarters / model.TENSOR_SHARE,
        "issue": found["instructions"] / quarters / model.PIPE_SHARE,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return f"{seconds[bound] * 1e6:.1f}, {bound}"
