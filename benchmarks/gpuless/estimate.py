"""Estimate the time of a compiled kernel by a roofline and its pipes. ESTIMATE, NOT MEASURED, +-30 %.

    compiled = aot.report(kernel, signature, constexprs, options=..., targets=["sm_80"])["sm_80"]
    print(estimate.kernel(compiled, "A100", blocks=512, iterations=64, flops=4e9, dram_bytes=2e7))
    print(estimate.memory("A100", dram_bytes=2e7))

Use it to rank configurations and to see which pipe is busiest. Never report its numbers as performance.

The instructions of the main loop are summed for each pipe of a multiprocessor. Overlap lies between none (`slowest`)
and perfect (`fastest`). `seconds` puts (HMMA + MUFU) at 92 %, the busiest pipe at 90 % (HMMA at 73 % of its peak),
memory at the effective bandwidth, and adds 5 us.

The constants were fitted to published figures. 33 memory-bound kernels on an A100 80GB fall in 0.73 to 1.34 of the
measured times; FlashAttention-2 forward on A100 (its paper's figures, quoted from memory) and A5000 and a large matmul
on A100 fall within 10 %. There was no held-out check, and the machine code came from other kernels than the published
times. Those kernels are expertly tuned: a first version reaches perhaps 0.7 of the estimate. Latency, caches, clocks
under load, and sm_90 and later are not modelled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from oner_fast.benchmarks.gpuless.aot import TargetReport

WARNING = "ESTIMATE, NOT MEASURED, +-30 %"
LAUNCH_SECONDS = 5e-6
# Shares of their peaks that good kernels reach.
TENSOR_SHARE, TENSOR_AND_EXPONENTIALS_SHARE, PIPE_SHARE = 0.73, 0.92, 0.9


@dataclass(frozen=True)
class Chip:
    """A GPU, described by the rates that good kernels reach on it.

    Args:
        target: the name that it is compiled for.
        sms: the number of multiprocessors.
        hertz: clock rate of the multiprocessors.
        bytes_per_second: DRAM bandwidth that good kernels reach, not the data sheet's.
        hmma, fma, alu, mufu: cycles of a warp instruction on a quarter of a multiprocessor; `hmma` is m16n8k16.
    """

    target: str
    sms: int
    hertz: float
    bytes_per_second: float
    hmma: float
    fma: float
    alu: float
    mufu: float


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41e9, 1700e9, 8, 2, 2, 8),
    "A5000": Chip("sm_86", 64, 1.695e9, 690e9, 16, 1, 2, 8),
}


@dataclass(frozen=True)
class Estimate:
    """Estimated time of a kernel. Print it together with its warning.

    Args:
        chip: a name of `CHIPS`.
        seconds: the estimate; `fastest` with perfect overlap, `slowest` with none.
        bound: the busiest pipe, or `memory`.
        cycles: cycles of each pipe, for one iteration of one block.
        flops, dram_bytes: FLOPs and DRAM bytes of the whole launch, as given.
        tail: rounds of blocks needed, divided by rounds filled; 1 when the blocks fill the chip evenly.
    """

    chip: str
    seconds: float
    fastest: float
    slowest: float
    bound: str
    cycles: dict[str, float]
    flops: float
    dram_bytes: float
    tail: float

    def __str__(self) -> str:
        rate = f", {self.flops / self.seconds / 1e12:.0f} TFLOP/s" if self.flops else ""
        cycles = {name: round(value) for name, value in self.cycles.items()}
        return (
            f"[{WARNING}] {self.chip}: {self.seconds * 1e6:.0f} us{rate}, between {self.fastest * 1e6:.0f} and "
            f"{self.slowest * 1e6:.0f} us, bound by {self.bound}; cycles per iteration {cycles}, "
            f"last round x{self.tail:.2f}"
        )


def pipe_cycles(names: Sequence[str], chip: Chip) -> dict[str, float]:
    """Return the cycles that one warp takes on each pipe. Cycles of `smem` are counted for the whole multiprocessor.

    Raises:
        ValueError: an instruction is one of later architectures than sm_86.
    """
    pipes = dict(hmma=0.0, fma=0.0, alu=0.0, mufu=0.0, smem=0.0, issue=float(len(names)))
    for name in names:
        if re.match("HGMMA|UTC", name):
            raise ValueError(f"{name}: only the matrix instructions of sm_80 and sm_86 are modelled")
        if name.startswith("HMMA"):
            pipes["hmma"] += chip.hmma if "16816" in name or "TF32" in name else chip.hmma / 2
        elif name.startswith("MUFU"):
            pipes["mufu"] += chip.mufu
        elif re.match(r"F(FMA|ADD|MUL)\b|IMAD|HFMA2|HADD2|HMUL2", name):
            pipes["fma"] += chip.fma
        elif name.startswith(("LDSM", "LDGSTS")):
            pipes["smem"] += 2 if name.startswith("LDSM") and "4" not in name.split(".")[-1] else 4
        elif name.startswith(("LDS", "STS", "SHFL")):
            pipes["smem"] += 4 if "128" in name else 2 if "64" in name else 1
        elif not re.match(r"LDG|STG|RED|ATOM|BAR|BRA|DEPBAR|WARPSYNC|NOP|U[A-Z]", name):
            pipes["alu"] += chip.alu
    return pipes


def kernel(
    compiled: TargetReport, chip: str, blocks: int, iterations: int, flops: float = 0, dram_bytes: float = 0
) -> Estimate:
    """Estimate a kernel whose time goes into its main loop.

    Args:
        compiled: the kernel's report for the chip's target.
        chip: a name of `CHIPS`.
        blocks: number of blocks in the launch.
        iterations: iterations of the loop in each block.
        flops, dram_bytes: FLOPs and DRAM bytes of the whole launch.

    Raises:
        ValueError: the report is for another target, or the kernel has no loop.
    """
    on = CHIPS[chip]
    if compiled.target != on.target or not compiled.loop:
        raise ValueError(f"{chip} needs a report for {on.target} of a kernel with a loop")
    pipes = pipe_cycles(compiled.loop, on)
    cycles = {name: n * compiled.warps if name == "smem" else n * compiled.warps / 4 for name, n in pipes.items()}

    def seconds(count: float) -> float:
        return count * iterations * blocks / on.sms / on.hertz

    busiest = max(cycles, key=lambda name: cycles[name])
    from_memory = dram_bytes / on.bytes_per_second
    compute = max(
        seconds(cycles["hmma"] + cycles["mufu"]) / TENSOR_AND_EXPONENTIALS_SHARE,
        seconds(cycles[busiest]) / (TENSOR_SHARE if busiest == "hmma" else PIPE_SHARE),
    )
    room = on.sms * max(1, compiled.blocks_per_sm)
    return Estimate(
        chip=chip,
        seconds=max(compute, from_memory) + LAUNCH_SECONDS,
        fastest=max(seconds(cycles[busiest]), from_memory),
        slowest=seconds(sum(n for name, n in cycles.items() if name != "issue")) + from_memory,
        bound="memory" if from_memory > compute else busiest,
        cycles=cycles,
        flops=flops,
        dram_bytes=dram_bytes,
        tail=-(-blocks // room) * room / blocks,
    )


def memory(chip: str, dram_bytes: float, launches: int = 1) -> Estimate:
    """Estimate kernels that are bound by memory alone, from the bytes that must cross the bus, read and written."""
    seconds = dram_bytes / CHIPS[chip].bytes_per_second
    return Estimate(
        chip=chip,
        seconds=seconds + launches * LAUNCH_SECONDS,
        fastest=seconds,
        slowest=seconds + 2 * launches * LAUNCH_SECONDS,
        bound="memory",
        cycles={},
        flops=0,
        dram_bytes=dram_bytes,
        tail=1.0,
    )
