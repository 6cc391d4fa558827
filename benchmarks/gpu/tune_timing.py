"""Compare tiles: results first, then time, in turns on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import Call
from oner_fast.benchmarks.gpu.tiles import label
from oner_fast.benchmarks.gpu.workloads import Workload
from oner_fast.benchmarks.precision import relative_error
from oner_fast.benchmarks.timing import Candidate, Rotation, Samples, interleave, ratio
from oner_fast.kernels.launch import Configuration
from oner_fast.kernels.tile_overrides import Key, override

# Tiles add in different orders, so their results may differ by this many units of the workload's dtype. Half precision
# rounds once at the end; float32 has long sums and products of three tf32 parts.
UNITS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 64.0}
# Times candidates, which are called with the number of a set of inputs; takes the number of sets, and seconds.
Timer = Callable[[Sequence[Candidate], int, float], Mapping[str, Samples]]


def results(key: Key, tile: Configuration, workload: Workload, phase: str, call: Call) -> tuple[Tensor, ...]:
    """Compute the results with `tile` for the key and the committed tile for every other key."""
    with override(*key, tile):
        return workload.run(phase, call)


def difference(found: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Describe how results differ from the committed tile's beyond rounding to `dtype`; empty where they do not."""
    for number, (mine, theirs) in enumerate(zip(found, truth, strict=True)):
        if not theirs.is_floating_point():
            if not torch.equal(mine, theirs):
                return f"result {number} differs"
            continue
        allowed = UNITS[dtype] * torch.finfo(dtype).eps
        error = relative_error(mine, theirs.double())
        if not error <= allowed:  # NaN is wrong too
            return f"result {number}: relative error {error:.2g}, allowed {allowed:.2g}"
    return ""


def turns(
    key: Key, tiles: Sequence[Configuration], workload: Workload, phase: str, inputs: Rotation[Call]
) -> list[Candidate]:
    """Make a candidate for each tile, named by its label."""

    def runner(tile: Configuration) -> Callable[[int], object]:
        return lambda number: results(key, tile, workload, phase, inputs[number])

    return [Candidate(label(tile), runner(tile)) for tile in tiles]


def on_gpu(candidates: Sequence[Candidate], sets: int, seconds: float) -> dict[str, Samples]:
    """Time candidates by the GPU's clock; returns the seconds of one call.

    Each candidate's calls, one on each set of inputs, are captured in a CUDA graph, since the launch of a short kernel
    takes longer than the kernel.
    """
    graphs, pool = [], torch.cuda.graph_pool_handle()
    for one in candidates:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            one.run(0)  # compiles, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):  # results are never read, so graphs may share memory
            for number in range(sets):
                one.run(number)
        graphs.append(Candidate(one.name, _replay(graph)))
    found = interleave(graphs, seconds=seconds, device="cuda")
    return {name: Samples(name, [each / sets for each in one.seconds]) for name, one in found.items()}


def _replay(graph: torch.cuda.CUDAGraph) -> Callable[[int], object]:
    return lambda number: graph.replay()


@dataclass(frozen=True)
class Scores:
    """Speed relative to the committed tile.

    A ratio compares two times of one round. Each quantile of the ratios is averaged over workloads by the geometric
    mean.

    `least` is the lowest median of any workload.
    """

    p20: float
    p50: float
    least: float


def scores(found: Sequence[Mapping[str, Samples]], committed: str, name: str) -> Scores:
    """Scores of the candidate `name`, from each workload's samples."""
    ratios = [ratio(samples[committed], samples[name]) for samples in found]
    return Scores(
        _mean([one.p20 for one in ratios]), _mean([one.p50 for one in ratios]), min(one.p50 for one in ratios)
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
