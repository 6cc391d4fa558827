"""Count a workload on a GPU by Nsight Compute's command line, `ncu`."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from oner_fast.benchmarks.cases import OURS, step
from oner_fast.benchmarks.first_gpu import children

SELF = "oner_fast.benchmarks.first_gpu.ncu"
SECTOR = 32
# Our names of what the emulator counts too, and the metrics that add up to them; sectors are counted in bytes.
METRICS: Mapping[str, tuple[str, ...]] = {
    "dram": ("dram__bytes_read.sum", "dram__bytes_write.sum"),
    "sectors": ("l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum", "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum"),
    "instructions": ("smsp__inst_executed.sum",),
    "conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
}
REFUSED = "ERR_NVGPUCTRPERM"


def found() -> str | None:
    """Return ncu's path, or None where it is not on PATH."""
    return shutil.which("ncu")


def command(workload: str) -> list[str]:
    """Return the command that counts a workload's step on the GPU."""
    metrics = ",".join(metric for each in METRICS.values() for metric in each)
    return [
        "ncu", "--profile-from-start", "off", "--csv", "--print-units", "base", "--metrics", metrics,
        *children.module(SELF, workload),
    ]  # fmt: skip


def count(workload: str, log: Path, seconds: float) -> dict[str, int]:
    """Count a workload's step.

    Returns the counts by the names of `METRICS`, and "launches".

    Raises:
        PermissionError: the driver lets only administrators read the counters.
        TimeoutError: it took more than `seconds`.
        RuntimeError: ncu failed, or counted no kernel.
    """
    ended = children.run(command(workload), log, seconds)
    text = log.read_text(encoding="utf-8", errors="replace")
    if REFUSED in text:
        raise PermissionError(f"the driver lets only administrators read the GPU's counters ({REFUSED})")
    if ended.timed_out:
        raise TimeoutError(f"ncu took more than {seconds:.0f} s")
    if ended.status:
        raise RuntimeError(f"ncu ended with status {ended.status}: {ended.last}")
    counts = parse(text.splitlines())
    if not counts["launches"]:
        raise RuntimeError(f"ncu counted no kernel: {ended.last}")
    return counts


def parse(lines: Iterable[str]) -> dict[str, int]:
    """Add up ncu's CSV, one line for each kernel and metric, among lines of other kinds."""
    totals = {"launches": 0, **dict.fromkeys(METRICS, 0)}
    launches = set()
    for line in csv.DictReader(line for line in lines if line.startswith('"')):
        name = next((name for name, metrics in METRICS.items() if line.get("Metric Name") in metrics), None)
        if name is None:
            continue
        launches.add(line["ID"])
        value = round(float(line["Metric Value"].replace(",", "")))
        totals[name] += value * (SECTOR if name == "sectors" else 1)
    totals["launches"] = len(launches)
    return totals


def main(workload: str) -> int:
    """Take a workload's step on the GPU between the calls that start and stop ncu's counting."""
    import torch

    from oner_fast.benchmarks.gpu.contest import CASES, contender

    one = contender(workload, OURS)
    call = one.layout(CASES[workload]().make(0, "cuda"))
    step(one.forward, call)  # compiles
    torch.cuda.synchronize()
    runtime = torch.cuda.cudart()
    runtime.cudaProfilerStart()
    step(one.forward, call)
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
