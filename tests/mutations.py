"""Mutation checks of the GPU kernels: each mutant of tests/mutants lacks a mask, an `other=` or a barrier, and has to
make a test fail.

    python tests/mutations.py [TEXT ...] [--jobs N]      only the mutants whose file or name holds one of the texts
    python tests/mutations.py --check                    only whether the list follows the kernels and the tests

First the list is checked: what each mutant replaces stands in its file, once; the tests that it names exist; and every
kernel has mutants. A mutant is then applied to a temporary copy of the tree and the tests that it names run on it,
without a GPU: Triton kernels in the strict interpreter (`compiled = true`: as sm_80 PTX on the CPU), CUDA C++ as PTX.
The tests have to pass on the unchanged copy first. A mutant that no test can catch says why in `equivalent`, and is not
run.
Exit status 1: a mutant survived, or one that is called equivalent was caught (--equivalent runs those too).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("benchmarks", "csrc", "kernels", "oner_fast", "tests", "train", "pyproject.toml")
# What these cost to import is paid once: every run is forked from a process that has them.
PRELOADED = ["torch", "torch._inductor.config", "triton", "numpy", "pytest", "hypothesis"]


@dataclass(frozen=True)
class Mutant:
    """`old`, which occurs once in `file`, becomes `new`; those of `tests` that `select` (pytest's -k) chooses run."""

    file: str
    tests: str
    name: str
    old: str
    new: str
    select: str
    equivalent: str = ""
    compiled: bool = False
    hangs: bool = False  # caught by the time limit: a loop that no longer ends

    def __str__(self) -> str:
        return f"{self.file.removeprefix('csrc/')}: {self.name}"


def mutants(folder: Path = ROOT / "tests" / "mutants") -> list[Mutant]:
    """All that tests/mutants lists: a file's `file`, `tests` and `select` hold for each that has none of its own."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        listed = tomllib.loads(path.read_text(encoding="utf-8"))
        common = {key: value for key, value in listed.items() if key != "mutant"}
        found += [Mutant(**{**common, **one}) for one in listed["mutant"]]
    return found


def problems(listed: Sequence[Mutant], root: Path) -> list[str]:
    """Return what does not fit the kernels and the tests of a tree."""
    found = []
    for mutant in listed:
        if (count := (root / mutant.file).read_text(encoding="utf-8").count(mutant.old)) != 1:
            found.append(f"{mutant}: what it replaces must occur once in {mutant.file}, and occurs {count} times")
        if mutant.old == mutant.new:
            found.append(f"{mutant}: it changes nothing")
        names = re.findall(r"def (test_\w+)", (root / mutant.tests).read_text(encoding="utf-8"))
        words = [word for word in re.findall(r"[a-z_]{8,}", mutant.select) if not word.startswith("dtype")]
        unknown = [word for word in words if not any(word in name for name in names)]
        if unknown or not words:
            found.append(f"{mutant}: no test of {mutant.tests} has {', '.join(unknown) or mutant.select} in its name")
    named = Counter(str(mutant) for mutant in listed)
    found += [f"{name}: {count} mutants have this name" for name, count in named.items() if count > 1]
    kernels = {
        str(path.relative_to(root))
        for path in [*(root / "kernels").glob("*.py"), *(root / "csrc" / "cuda").glob("*.cu*")]
        if re.search(r"tl\.(load|store)\(|__global__", path.read_text(encoding="utf-8"))
    }
    return found + [f"{file}: it has no mutant" for file in sorted(kernels - {mutant.file for mutant in listed})]


def apply(mutant: Mutant, tree: Path) -> str:
    """Writes the mutant into a tree, and returns what its file held before."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    return before


def copy_tree(to: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)
    return to


def run_pytest(tree: Path, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """In a process of its own: exits with pytest's status."""
    assert "oner_fast" not in sys.modules, "the tests have to import the package of the tree"
    os.environ.update(environment)
    os.chdir(tree)
    sys.dont_write_bytecode = True  # a mutant as long as what it replaces would be taken for it
    sys.path[:] = [str(tree), *(x for x in sys.path if Path(x or ".").resolve() not in (ROOT, ROOT / "tests"))]
    with open(log, "w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        import pytest

        code = pytest.main(["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Runner:
    """Runs tests on a copy of the tree, in processes of their own."""

    def __init__(self, folder: Path, limit: float) -> None:
        # Triton decides as it is imported whether it interprets: what it compiles starts anew.
        self.interpreting = multiprocessing.get_context("forkserver")
        self.interpreting.set_forkserver_preload(PRELOADED)
        self.compiling = multiprocessing.get_context("spawn")
        self.tree, self.limit, self.log = copy_tree(folder), limit, folder / "log"

    def tests(self, tests: str, select: str, compiled: bool) -> tuple[int | None, str]:
        """pytest's status, or None where time ran out; and its last words."""
        environment = {"PYTHONPATH": str(self.tree), "TRITON_INTERPRET": "0" if compiled else "1"}
        context = self.compiling if compiled else self.interpreting
        process = context.Process(target=run_pytest, args=(self.tree, [tests, "-k", select], environment, self.log))
        process.start()
        process.join(self.limit)
        if process.is_alive():
            process.kill()
            process.join()
            return None, ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line.split("::")[-1].split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
        return process.exitcode, (failed or lines[-1:] or [""])[0]

    def verdict(self, mutant: Mutant) -> tuple[str, str]:
        """caught or SURVIVED, and by what; BROKEN where the tests could not run at all."""
        before = apply(mutant, self.tree)
        try:
            status, words = self.tests(mutant.tests, mutant.select, mutant.compiled)
        finally:
            (self.tree / mutant.file).write_text(before, encoding="utf-8")
        if status is None:
            return ("caught" if mutant.hangs else "TIME LIMIT"), f"did not end in {self.limit:.0f} s"
        return {0: "SURVIVED", 1: "caught"}.get(status, "BROKEN"), words


def passing(runner: Runner, chosen: Iterable[Mutant]) -> None:
    """The tests that the mutants name, on the tree as it is: all pass, and at least one is not skipped."""
    together: dict[tuple[str, bool], set[str]] = {}
    for mutant in chosen:
        together.setdefault((mutant.tests, mutant.compiled), set()).add(mutant.select)
    for (tests, compiled), selections in sorted(together.items()):
        status, words = runner.tests(tests, " or ".join(f"({x})" for x in sorted(selections)), compiled)
        if status != 0 or not re.search(r"\d+ passed", words):
            raise SystemExit(f"{tests}: the tests do not pass on the tree as it is ({words or 'they did not end'})")
        print(f"unchanged: {tests}: {words}", flush=True)


def check(chosen: Sequence[Mutant], jobs: int, limit: float) -> list[tuple[str, Mutant]]:
    """Verdicts in the order they come; Ctrl-C ends with those that are there."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    verdicts: list[tuple[str, Mutant]] = []
    for mutant in chosen:
        waiting.put(mutant)
    stop = threading.Event()

    def work(runner: Runner) -> None:
        while not stop.is_set():
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            verdict, words = runner.verdict(mutant)
            verdicts.append((verdict, mutant))
            place = f"{len(verdicts)}/{len(chosen)}"
            print(f"{place:>8}  {verdict:<10} {time.monotonic() - began:4.0f} s  {mutant}  [{words}]", flush=True)

    with tempfile.TemporaryDirectory(prefix="oner-fast-mutants-") as folder:
        runners = []
        for i in range(min(jobs, len(chosen))):
            (Path(folder) / str(i)).mkdir()
            runners.append(Runner(Path(folder) / str(i), limit))
        passing(runners[0], chosen)
        threads = [threading.Thread(target=work, args=(runner,)) for runner in runners]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            print("stopping behind the tests that are running", flush=True)
            stop.set()
            for thread in threads:
                thread.join()
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="texts of which a mutant's file or name must hold one")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs at a time")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a mutant's tests may take")
    parser.add_argument("--equivalent", action="store_true", help="run those that are called equivalent, too")
    parser.add_argument("--check", action="store_true", help="check the list, and run nothing")
    options = parser.parse_args()
    every = mutants()
    if found := problems(every, ROOT):
        raise SystemExit("the list of mutants is out of date:\n" + "\n".join(found))
    if options.check:
        print(f"{len(every)} mutants follow the kernels and the tests")
        return 0
    from oner_fast.benchmarks.gpuless import tools  # here: the runs import this file, and the package of their own tree

    if absent := tools.missing(*tools.FOR_INTERPRETER, *tools.FOR_EMULATE, *tools.FOR_CUDA):
        raise SystemExit(f"needs {', '.join(absent)}")
    listed = [x for x in every if not options.only or any(text in str(x) for text in options.only)]
    if not listed:
        raise SystemExit(f"no mutant's file or name holds one of {options.only}")
    equivalent = [x for x in listed if x.equivalent]
    chosen = listed if options.equivalent else [x for x in listed if not x.equivalent]
    os.environ["TRITON_INTERPRET"] = "1"  # of the process that the runs are forked from
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    verdicts = check(chosen, options.jobs, options.limit) if chosen else []
    for mutant in equivalent:
        print(f"equivalent  {mutant}: {mutant.equivalent}")
    bad = [(x, y) for x, y in verdicts if (x != "caught") != bool(y.equivalent)]
    print(
        f"{sum(x == 'caught' for x, _ in verdicts)} caught of {len(verdicts)} run and {len(chosen)} chosen, "
        f"{len(equivalent)} equivalent"
    )
    for verdict, mutant in bad:
        print(f"{verdict}, called {'equivalent' if mutant.equivalent else 'wrong'}: {mutant}")
    return 1 if bad or len(verdicts) < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
