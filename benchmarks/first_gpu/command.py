"""`oner-fast gpu`: check and measure everything that only a GPU can show, in nine minutes and without a network.

Six parts run one after another, each in a process of its own with its own time limit:
{parts}
Each leaves its findings (JSON and text) in the folder, whatever happens to the next. A table closes the run. The
training step, the ops and their tests need torch and its Triton alone; what needs more is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oner_fast.benchmarks.first_gpu import children, record, summary
from oner_fast.benchmarks.first_gpu.parts import PARTS, REHEARSAL, SELF, Part
from oner_fast.benchmarks.first_gpu.record import FAILURES, Findings

COMMAND = "oner-fast gpu"
DEFAULT_FOLDER = Path("runs/gpu")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    parts = "\n".join(f"  {part.name:<10}{part.title} ({part.seconds:.0f} s)" for part in PARTS)
    made = argparse.ArgumentParser(
        prog=COMMAND,
        description=(__doc__ or "").format(parts=parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--rehearse", action="store_true", help="run all that a CPU can, at small shapes; no GPU")
    made.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help=f"folder of the findings ({DEFAULT_FOLDER})")
    names = [part.name for part in PARTS]
    made.add_argument("--parts", nargs="+", choices=names, default=names, help="only these, in this order")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the parts; returns 1 where one failed, and 2 for bad input or where there is no GPU."""
    options = parser().parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        return _fail(f"--out must be a folder, and {options.out} is a file")
    if not options.rehearse and (reason := why_no_gpu()):
        return _fail(f"{reason}; --rehearse runs all that a CPU can")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe(options.rehearse)
    print(machine, flush=True)
    found: list[Findings] = []
    saved = 0.0
    try:
        for part in (each for each in PARTS if each.name in options.parts):
            limit = REHEARSAL if options.rehearse else saved + part.seconds
            print(f"{part.name}: {part.title}, at most {limit:.0f} s ...", flush=True)
            one = run_part(part, options.out, limit, options.rehearse)
            saved = max(limit - one.seconds, 0.0)
            found.append(one)
            summary.write(options.out, found, machine)
            print(f"{part.name}: {one.verdict} in {one.seconds:.0f} s. {one.skipped or one.headline}", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {options.out} holds the findings of the finished parts", file=sys.stderr)
        return 130
    print(f"\n{summary.text(found)}\n\nwrote {options.out}/summary.md", flush=True)
    return int(any(one.verdict in FAILURES for one in found))


def run_part(part: Part, folder: Path, limit: float, rehearse: bool) -> Findings:
    """Run one part in a process of its own and judge what it left in `folder`."""
    path = folder / f"{part.name}.json"
    path.unlink(missing_ok=True)
    arguments = [part.name, "--out", str(folder), "--seconds", f"{limit - children.PATIENCE}"]
    environment = {"TRITON_INTERPRET": str(int(part.interpreted and rehearse))}
    start = time.monotonic()
    ended = children.run(
        children.module(SELF, *arguments, *(["--rehearse"] if rehearse else [])),
        folder / f"{part.name}.txt", limit - children.PATIENCE, environment,
    )  # fmt: skip
    one = record.read(path, part.name)
    status = 0 if one.finished and one.failures and ended.status == 1 else ended.status
    one.judge(timed_out=ended.timed_out, status=status, limit=limit, last=ended.last)
    one.seconds = time.monotonic() - start
    record.write(path, one)
    return one


def why_no_gpu() -> str:
    """Return why torch has no GPU; empty where it has one."""
    import torch

    if torch.cuda.is_available():
        return ""
    build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda} and finds none"
    return f"this needs a GPU that torch can use; torch {torch.__version__} is {build}"


def describe(rehearse: bool) -> str:
    """Return the line that names the machine."""
    from oner_fast.benchmarks.machine import describe as machine

    prefix = "REHEARSAL on a CPU, no figure of a GPU: " if rehearse else ""
    return f"{prefix}{machine('cpu' if rehearse else 'cuda').line()}"


def _fail(message: str) -> int:
    print(f"{COMMAND}: {message}", file=sys.stderr)
    return 2
