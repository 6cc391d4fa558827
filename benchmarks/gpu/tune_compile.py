"""Compile the candidates of a tuning without a GPU; only the kernels that read the tile are compiled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from oner_fast.benchmarks.gpu.kernels import compilations
from oner_fast.benchmarks.gpu.machine_code import compile_triton
from oner_fast.kernels.launch import REFERENCE_ARCHITECTURE, Compilation, Configuration, configuration
from oner_fast.kernels.tile_overrides import Key, override, tiles_of

UNLISTED = "no list of compilations has it, so it is unknown whether it spills"
# A tile, its problems (none: it may be timed), and its resources for each compilation and target.
Compiled = tuple[Configuration, list[str], list[dict[str, Any]]]
Compiler = Callable[[Key, Sequence[Configuration], Sequence[str]], Iterable[Compiled]]


def affected(key: Key, tile: Configuration, architecture: int) -> list[Compilation]:
    """List the compilations that read the key's tile, as `tile` changes them."""

    def given(one: Configuration) -> dict[str, Compilation]:
        with override(*key, one):
            return {each.name: each for each in compilations()}

    with tiles_of(architecture):
        found, other = given(tile), given(replace(tile, num_warps=2 * tile.num_warps))
    return [one for name, one in found.items() if one.options != other[name].options]


def compile_tiles(
    key: Key, tiles: Sequence[Configuration], targets: Sequence[str], *, jobs: int = os.cpu_count() or 1
) -> Iterator[Compiled]:
    """Compile all tiles, several at a time, and yield each when it is done, in order.

    A tile that appears in no list of compilations in `oner_fast.kernels` is not compiled; this is reported as its
    problem.
    """
    if not tiles:
        return
    if not affected(key, configuration(*key, REFERENCE_ARCHITECTURE), REFERENCE_ARCHITECTURE):
        yield from ((tile, [UNLISTED], []) for tile in tiles)
        return
    if jobs == 1:
        yield from (compile_tile(key, tile, targets) for tile in tiles)
        return
    # Processes are spawned, as torch's threads do not survive a fork.
    with ProcessPoolExecutor(min(jobs, len(tiles)), get_context("spawn")) as pool:
        try:
            yield from pool.map(compile_tile, [key] * len(tiles), tiles, [targets] * len(tiles))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def compile_tile(key: Key, tile: Configuration, targets: Sequence[str]) -> Compiled:
    """Compile one tile for every target."""
    problems, resources = [], []
    for target in targets:
        for one in affected(key, tile, int(target.removeprefix("sm_"))):
            found = compile_triton(one, target)
            problems += [f"{one.name} on {target}: {problem}" for problem in found.problems(one.tensor_cores)]
            resources.append(
                {
                    "name": one.name, "target": target, "registers": found.registers, "spills": found.local,
                    "shared": found.shared, "occupancy": found.occupancy,
                }
            )  # fmt: skip
            if problems:  # one problem is enough, and the other compilations take longest
                return tile, problems, resources
    return tile, problems, resources
