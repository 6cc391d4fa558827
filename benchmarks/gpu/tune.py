"""`oner-fast bench gpu-tune`: time tiles near the committed ones on this GPU, and commit those that are clearly faster.

For each (op, kernel, class of shapes), tiles that spill or do not fit are dropped, compiled as for the report of
resources. A tile whose results differ from the committed tile's is refused. The rest take turns on the workloads of the
class. The fastest are timed once more, and the best is written to kernels/configurations where the lower quantile of
its speedups reaches the margin. Then its own neighbours are tried. Each tile leaves a line in the log; after an
interruption the same command continues. --dry-run and --compile-only need no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from oner_fast.benchmarks.cases import Call
from oner_fast.benchmarks.gpu.tiles import commit, label, neighbours
from oner_fast.benchmarks.gpu.tune_compile import Compiler, compile_tiles
from oner_fast.benchmarks.gpu.tune_log import Log
from oner_fast.benchmarks.gpu.tune_timing import Scores, Timer, difference, on_gpu, results, scores, turns
from oner_fast.benchmarks.gpu.workloads import Workload, workloads
from oner_fast.benchmarks.gpuless.architectures import GATED
from oner_fast.benchmarks.timing import Rotation
from oner_fast.kernels.launch import REFERENCE_ARCHITECTURE, Configuration, configuration
from oner_fast.kernels.tile_overrides import Key, committed_keys, counted_lookups

COMMAND = "oner-fast bench gpu-tune"
DEFAULT_LOG = Path("runs/gpu_tune.jsonl")
MARGIN = 0.03
FINALISTS = 3
MOST_MOVES = 4  # most moves from a tile to a neighbour, for one key in one run
# No workload of a class may become slower by more than this in favour of the others.
LOSS = 0.01
MOST_SETS = 8  # sets of inputs of a workload


@dataclass
class Tuner:
    """Tune keys one by one; everything that needs a GPU is passed in.

    Args:
        architecture: the architecture whose tiles are tuned, 80 for sm_80.
        gpu: its name, for the log.
        log: the log of results.
        device: where workloads run.
        timer: times tiles on one workload.
        compiler: compiles tiles.
        of: lists the workloads of an op.
        changes: most numbers in which a candidate may differ.
        margin: the least speedup that moves a tile, 0.03 for 3 %.
        seconds: time for each workload.
        say: prints progress.
    """

    architecture: int
    gpu: str
    log: Log
    device: str = "cuda"
    timer: Timer = on_gpu
    compiler: Compiler = compile_tiles
    of: Callable[[str], list[Workload]] = workloads
    changes: int = 2
    margin: float = MARGIN
    seconds: float = 2.0
    say: Callable[[str], None] = print
    _inputs: dict[str, tuple[str, Rotation[Call]]] = field(default_factory=dict)
    _asking: dict[str, list[tuple[Workload, Counter[Key], Counter[Key]]]] = field(default_factory=dict)

    def tune(self, key: Key) -> int:
        """Tune a key; returns how often its tile was moved."""
        for moves in range(MOST_MOVES):
            if not self._move(key):
                return moves
        return MOST_MOVES

    def _move(self, key: Key) -> bool:
        committed = configuration(*key, self.architecture)
        if self.log.settled(key, committed, self.changes):
            self.say(f"{' '.join(key)}: settled before")
            return False
        timed = self._workloads(key)
        if not timed:
            self.say(f"{' '.join(key)}: no workload uses it")
            return False
        able = [tile for tile in self.compilable(key) if self._right(key, tile, timed)]
        first = self._time(key, [committed, *able], timed, "timed")
        finalists = sorted((tile for tile in able if first[label(tile)].p50 > 1), key=lambda t: -first[label(t)].p50)
        chosen = committed
        if finalists:
            final = self._time(key, [committed, *finalists[:FINALISTS]], timed, "timed again")
            better = [
                tile for tile in finalists[:FINALISTS]
                if final[label(tile)].p20 >= 1 + self.margin and final[label(tile)].least >= 1 - LOSS
            ]  # fmt: skip
            chosen = max(better, key=lambda tile: final[label(tile)].p50, default=committed)
        if chosen != committed:
            commit(key, self.architecture, chosen)
            self.say(f"{' '.join(key)}: {label(committed)} -> {label(chosen)}, {final[label(chosen)].p50:.3f}x")
        else:
            self.say(f"{' '.join(key)}: stays at {label(committed)} ({len(able)} others timed)")
        self.log.write("decided", key, committed, chosen=chosen.launch, changes=self.changes)
        return chosen != committed

    def compilable(self, key: Key) -> list[Configuration]:
        """List the neighbours of the committed tile that neither spill nor exceed a limit of the GPUs that use them."""
        tiles = neighbours(key, configuration(*key, self.architecture), self.changes)
        targets = served_by(key, self.architecture)
        known = {label(tile): self.log.compiled(key, tile, targets) for tile in tiles}
        new = [tile for tile in tiles if known[label(tile)] is None]
        for tile, problems, resources in self.compiler(key, new, targets):
            known[label(tile)] = problems
            self.log.write("compiled", key, tile, targets=targets, problems=problems, resources=resources)
        return [tile for tile in tiles if not known[label(tile)]]

    def _workloads(self, key: Key) -> list[tuple[Workload, str]]:
        """List workloads with the phase to time: "forward" where only forward uses the key, else the whole step."""
        op = key[0]
        if op not in self._asking:
            self._asking[op] = [
                (one, self._asked_by(one, "forward"), self._asked_by(one, "step")) for one in self.of(op)
            ]
        return [
            (one, "step" if step[key] > forward[key] else "forward")
            for one, forward, step in self._asking[op]
            if step[key]
        ]

    def _asked_by(self, one: Workload, phase: str) -> Counter[Key]:
        with counted_lookups() as read:
            one.run(phase, one.make(0, self.device))
        return read

    def _right(self, key: Key, tile: Configuration, timed: Sequence[tuple[Workload, str]]) -> bool:
        committed = configuration(*key, self.architecture)
        for one, phase in timed:
            call = self._inputs_of(one)[0]
            truth = results(key, committed, one, phase, call)
            try:
                why = difference(results(key, tile, one, phase, call), truth, one.dtype)
            except Exception as error:  # a tile that cannot be launched is refused, like a wrong one
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if why:
                self.log.write("refused", key, tile, workload=one.name, why=why)
                self.say(f"{' '.join(key)}: {label(tile)} refused: {one.name}: {why}")
                return False
        return True

    def _time(
        self, key: Key, tiles: Sequence[Configuration], timed: Sequence[tuple[Workload, str]], kind: str
    ) -> dict[str, Scores]:
        """Time tiles; returns, by label, how many times faster than the first each is, over all workloads."""
        found = []
        for one, phase in timed:
            inputs = self._inputs_of(one)
            samples = self.timer(turns(key, tiles, one, phase, inputs), len(inputs.sets), self.seconds)
            found.append(samples)
            for tile in tiles:
                mine = samples[label(tile)]
                self.log.write(
                    kind, key, tile, workload=one.name, phase=phase, seconds=[mine.p20, mine.p50, mine.p80],
                    samples=len(mine.seconds),
                )  # fmt: skip
        return {label(tile): scores(found, label(tiles[0]), label(tile)) for tile in tiles}

    def _inputs_of(self, one: Workload) -> Rotation[Call]:
        """Make inputs larger than the caches; they are kept while workloads of the same op are timed."""
        if self._inputs and next(iter(self._inputs.values()))[0] != one.op:
            self._inputs.clear()
        if one.name not in self._inputs:
            size = one.make(0, self.device).bytes()
            made = Rotation(lambda seed: one.make(seed, self.device), size, MOST_SETS, device=self.device)
            self._inputs[one.name] = one.op, made
        return self._inputs[one.name][1]


def served_by(key: Key, architecture: int) -> list[str]:
    """Return the targets that use a tile: its own architecture, and newer gated ones without a tile of their own."""
    found = [f"sm_{architecture}"]
    for target in GATED:
        newer = int(target.removeprefix("sm_"))
        if newer > architecture and configuration(*key, newer) is configuration(*key, architecture):
            found.append(target)
    return found


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command."""
    made = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--op", nargs="+", metavar="NAME", help="only these ops, named as in kernels/configurations")
    made.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    made.add_argument("--shape-class", nargs="+", metavar="CLASS", help="only these classes of shapes")
    made.add_argument("--architecture", metavar="sm_XX", help="this GPU's (default); without one sm_80 or any other")
    made.add_argument("--dry-run", action="store_true", help="print the candidates, compile and time nothing")
    made.add_argument(
        "--compile-only", action="store_true", help="list the candidates that spill or do not fit; no GPU"
    )
    made.add_argument("--changes", type=int, default=2, help="most numbers in which a candidate may differ (2)")
    made.add_argument("--margin", type=float, default=MARGIN, help=f"the least speedup that moves a tile ({MARGIN})")
    made.add_argument("--seconds", type=float, default=2.0, help="time for each workload (2)")
    made.add_argument("--log", type=Path, default=DEFAULT_LOG, help=f"JSON lines about every tile ({DEFAULT_LOG})")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, 2 for bad input or where there is no GPU to time on, 130 when interrupted."""
    options = parser().parse_args(argv)
    gpu = torch.cuda.is_available()
    try:
        architecture = _architecture(options.architecture, gpu and not (options.dry_run or options.compile_only))
        chosen = select(options.op, options.kernel, options.shape_class)
        _check(options)
    except ValueError as error:
        return _fail(str(error))
    if options.dry_run:
        return _dry_run(chosen, architecture, options.changes)
    if not gpu and not options.compile_only:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return _fail(
            f"tiles are timed on a GPU; this torch is {build} and finds none "
            "(--dry-run lists the candidates, --compile-only says which of them spill)"
        )
    name = torch.cuda.get_device_name() if gpu else ""
    with Log(options.log, "" if options.compile_only else name, architecture) as log:
        tuner = Tuner(
            architecture, name, log, compiler=lambda *task: compile_tiles(*task, jobs=options.jobs),
            changes=options.changes, margin=options.margin, seconds=options.seconds,
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
        try:
            for number, key in enumerate(chosen, 1):
                print(f"{number} of {len(chosen)}: {' '.join(key)} ...", file=sys.stderr, flush=True)
                if options.compile_only:
                    _compile_only(tuner, key)
                else:
                    tuner.tune(key)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {options.log} holds the findings; the same command continues", file=sys.stderr)
            return 130
    return 0


def _dry_run(chosen: Iterable[Key], architecture: int, changes: int) -> int:
    for key in chosen:
        tile = configuration(*key, architecture)
        found = neighbours(key, tile, changes)
        print(f"{' '.join(key)} on sm_{architecture}: {label(tile)}; {len(found)} candidates")
        for one in found:
            print(f"  {label(one)}")
    return 0


def _compile_only(tuner: Tuner, key: Key) -> None:
    able = tuner.compilable(key)
    tile = configuration(*key, tuner.architecture)
    every = neighbours(key, tile, tuner.changes)
    targets = served_by(key, tuner.architecture)
    print(f"{' '.join(key)} on {', '.join(targets)}: {len(able)} of {len(every)} candidates neither spill nor overflow")
    for one in every:
        if problems := tuner.log.compiled(key, one, targets):
            print(f"  {label(one)}: {'; '.join(problems)}")


def select(ops: Sequence[str] | None, kernels: Sequence[str] | None, classes: Sequence[str] | None) -> list[Key]:
    """Committed keys that pass the filters. Raises ValueError where a filter leaves none, listing the known names."""
    found = committed_keys()
    for place, what, names in ((0, "op", ops), (1, "kernel", kernels), (2, "class of shapes", classes)):
        known = list(dict.fromkeys(key[place] for key in found))
        for name in names or ():
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
        found = [key for key in found if not names or key[place] in names]
    if not found:
        raise ValueError("no kernel has that class of shapes")
    return found


def _architecture(given: str | None, timing: bool) -> int:
    here = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        here = 10 * major + minor
    if given is None:
        return here or REFERENCE_ARCHITECTURE
    number = given.removeprefix("sm_")
    if not number.isdigit() or int(number) < REFERENCE_ARCHITECTURE:
        raise ValueError(f"--architecture must be sm_{REFERENCE_ARCHITECTURE} or newer, got {given!r}")
    if timing and int(number) != here:
        raise ValueError(f"--architecture {given} cannot be timed here: this GPU is sm_{here}")
    return int(number)


def _check(options: argparse.Namespace) -> None:
    if options.changes < 1:
        raise ValueError(f"--changes must be at least 1, got {options.changes}")
    if not 0 <= options.margin < float("inf"):
        raise ValueError(f"--margin must not be negative, got {options.margin:g}")
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds must be positive, got {options.seconds:g}")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if options.log.is_dir():
        raise ValueError(f"--log must be a file, and {options.log} is a folder")


def _fail(message: str) -> int:
    print(f"{COMMAND}: {message}", file=sys.stderr)
    return 2
