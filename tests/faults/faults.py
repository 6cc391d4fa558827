"""Faults at system calls: every one of them, once, for one tiny run of each command."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

HERE = Path(__file__).parent
KILL, SHORT = -1, -2
NAMES = {KILL: "kill", SHORT: "short"}
# What may happen at a call of each kind.
FAULTS = {
    "open": (errno.EACCES, errno.EIO),
    "create": (errno.ENOSPC, errno.EACCES, KILL),
    "read": (errno.EIO, SHORT),
    "write": (errno.ENOSPC, errno.EIO, SHORT, KILL),
    "fsync": (errno.EIO, errno.ENOSPC, KILL),
    "rename": (errno.ENOSPC, errno.EACCES, errno.EIO, KILL),
    "unlink": (errno.EACCES, errno.EIO, KILL),
    "mkdir": (errno.ENOSPC, errno.EACCES, KILL),
    "opendir": (errno.EACCES, errno.EIO),
    "lock": (errno.ENOLCK,),
    "truncate": (errno.EIO,),
    "mmap": (errno.ENOMEM, errno.EIO),
}
# Words by which a command that goes on names what it left out.
NAMED = re.compile(
    r"corrupt sample|damaged data|left out|cannot be written|no snapshot|cannot be cached|cannot be removed|damaged"
)
TIMES = {"seconds", "samples_per_second", "data_wait", "mfu"}
TEMPORARY = re.compile(r"\.\d+(-[0-9a-f]{8})?\.tmp|events\.out\.\S+")


@dataclass(frozen=True)
class Call:
    """One access to a file: its number in the run, its kind, and the file without what differs between runs."""

    number: int
    kind: str
    path: str


@dataclass(frozen=True)
class Scenario:
    """A command on a folder.

    Attributes:
        name: what the tables call it.
        argv: the command line, made from the folder.
        outcome: what the command leaves, to be compared: by path, the content.
        sample: how many faults the quick set has.
    """

    name: str
    argv: Callable[[Path], list[str]]
    outcome: Callable[[Path], dict[str, Any]]
    sample: int


@dataclass
class Result:
    """The consequence of a fault.

    Attributes:
        ended: `as if nothing had been`, `goes on, named`, `a sentence`, or `killed`.
        wrong: what broke a promise; empty where nothing did.
    """

    scenario: str
    call: Call
    how: int
    ended: str
    wrong: list[str] = field(default_factory=list)
    said: str = ""

    def __str__(self) -> str:
        fault = NAMES.get(self.how) or errno.errorcode[self.how]
        place = f"{self.scenario}: {fault} at {self.call.kind} {self.call.number} of {self.call.path}"
        return f"{place}: {'; '.join(self.wrong) or self.ended}\n    {self.said.strip()[-600:]}"


def build_shim(folder: Path) -> Path:
    """Compile the shim into `folder`."""
    library = folder / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


class Server:
    """The process that runs commands with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {
            "LD_PRELOAD": str(build_shim(folder)),
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            "ONER_FAST_TRACEBACK": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert json.loads(self._read())["ready"]

    def run(self, argv: list[str], prefix: Path, victim: int = -1, how: int = 0) -> dict[str, Any]:
        """Run a command; its access number `victim` meets the fault `how`."""
        request = {
            "argv": argv,
            "prefix": str(prefix),
            "victim": victim,
            "how": how,
            "seconds": 60,
            "scratch": str(self.folder),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._read())
        return answer

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Bench:
    """The folders of the scenarios: for each the state before the command, and a place where it runs."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder)
        self.states = folder / "states"
        self.place = folder / "place"
        self.states.mkdir()

    def begin(self, scenario: Scenario) -> None:
        """Put the state before the command in its place."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.states / scenario.name, self.place, symlinks=True)

    def calls(self, scenario: Scenario) -> tuple[list[Call], dict[str, Any]]:
        """Run without a fault; return every access and the outcome."""
        self.begin(scenario)
        done = self.server.run(scenario.argv(self.place), self.place)
        assert done["code"] == 0, done["said"]
        calls = [Call(number, kind, TEMPORARY.sub("*", path)) for number, (kind, path) in enumerate(done["calls"])]
        return calls, scenario.outcome(self.place)

    def meet(self, scenario: Scenario, call: Call, how: int, expected: dict[str, Any]) -> Result:
        """Let one access fail and judge what follows, then run the command again without a fault."""
        self.begin(scenario)
        argv = scenario.argv(self.place)
        done = self.server.run(argv, self.place, call.number, how)
        code, said = done["code"], done["said"]
        result = Result(scenario.name, call, how, "", said=said)
        if code is None:
            result.wrong.append("it hung for a minute")
        elif "Traceback" in said or "unexpected " in said:
            result.wrong.append("a traceback or an unexpected exception")
        elif code == 0:
            # A temporary file of an earlier writer may stay where it cannot be removed; the next start removes it.
            left = {name: content for name, content in scenario.outcome(self.place).items() if "/." not in name}
            found = differences(expected, left)
            result.ended = "goes on, named" if NAMED.search(said) else "as if nothing had been"
            if found and not NAMED.search(said):
                result.wrong.append(f"another outcome in silence: {', '.join(found)}")
            return result
        elif code == 1:
            result.ended = "a sentence"
            lines = [line for line in said.splitlines() if line.startswith("oner-fast")]
            if len(lines) != 1 or not said.rstrip().endswith(lines[-1]):
                result.wrong.append("not one sentence at the end")
        elif code == -signal.SIGKILL and how == KILL:
            result.ended = "killed"
        else:
            result.wrong.append(f"exit status {code}")
        again = self.server.run(argv, self.place)
        if again["code"] != 0:
            result.wrong.append(f"run again, it ended with {again['code']}: {again['said'].strip()[-300:]}")
        elif found := differences(expected, scenario.outcome(self.place)):
            result.wrong.append(f"run again, another outcome: {', '.join(found)}")
        return result

    def close(self) -> None:
        """End the server."""
        self.server.close()


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the parts that differ, are missing, or are left over."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def every(calls: list[Call]) -> Iterator[tuple[Call, int]]:
    """Yield every fault of every access; of the figures, which one function writes, those of the first."""
    figures = {(call.kind, call.path) for call in calls if "/figures/" in call.path}
    first = min((path for _, path in figures), default="")
    for call in calls:
        for how in FAULTS[call.kind] if "/figures/" not in call.path or call.path == first else ():
            yield call, how


def some(calls: list[Call], most: int) -> list[tuple[Call, int]]:
    """Take one access of each kind to each kind of file, at most `most` of them, with the faults of a kind in turn."""
    first: dict[tuple[str, str], Call] = {}
    for call in calls:
        first.setdefault((call.kind, alike(call.path)), call)
    taken = sorted(first.values(), key=lambda call: (call.kind, call.number))
    taken = [taken[number * len(taken) // most] for number in range(most)] if len(taken) > most else taken
    turn: Counter[str] = Counter()
    chosen = []
    for call in taken:
        faults = FAULTS[call.kind]
        chosen.append((call, faults[turn[call.kind] % len(faults)]))
        turn[call.kind] += 1
    return chosen


ENDS = ("as if nothing had been", "goes on, named", "a sentence", "killed")


def row(name: str, calls: list[Call], results: list[Result]) -> str:
    """Make the line of a scenario for the table in docs/reliability.md."""
    ended = Counter(result.ended for result in results)
    wrong = sum(bool(result.wrong) for result in results)
    cells = [name, len(calls), len(results), *(ended[end] for end in ENDS), wrong]
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |"


def alike(path: str) -> str:
    """Path of a file without its number; all figures count as one file."""
    return re.sub(r"figures/\S+", "figures/*", re.sub(r"\d+", "N", path))


def files(folder: Path, *patterns: str) -> dict[str, Any]:
    """Contents by path; temporary files, which should not be left, count too."""
    found = {}
    for pattern in (*patterns, "**/.*"):
        for path in folder.glob(pattern):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# The scenarios.

TRAIN = {
    "image_size": 12, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "embed_dim": 8, "projector_hidden": 16,
    "predictor_hidden": 16, "max_text_tokens": 8, "tokenizer_vocab": 80, "batch_size": 4, "steps": 4, "warmup": 1,
    "save_every": 2, "log_every_n_steps": 1, "snapshot_every": 2, "snapshot_pairs": 2, "workers": 0, "threads": 1,
    "precision": "fp32", "device": "cpu", "keep_checkpoints": 1,
}  # fmt: skip
COLOURS = ("red", "green", "blue", "grey")


def picture(number: int) -> bytes:
    """PNG of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (14, 12), (40 * number % 256, 255 - 20 * number, 7 * number)).save(data, "PNG")
    return data.getvalue()


def caption(number: int) -> str:
    """Caption of a picture."""
    return f"a {COLOURS[number % 4]} picture of size {number}"


def write_source(folder: Path, count: int = 12) -> None:
    """Write pictures with a caption file beside each."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02d}.png").write_bytes(picture(number))
        (folder / f"{number:02d}.txt").write_text(caption(number))


def write_tars(folder: Path) -> None:
    """Write a train and a val tar without an index."""
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(8)), ("val", range(8, 11))):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number in numbers:
                for suffix, data in (("png", picture(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def train_words(place: Path) -> list[str]:
    """Command line of a training."""
    words = ["train", "oner"]
    for name, value in {"train_data": place / "data", "run_dir": place / "run", **TRAIN}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def trained(place: Path) -> dict[str, Any]:
    """Everything that a training leaves but TensorBoard's events, the readings of clocks, and the caches of indexes.

    Of the checkpoints the newest counts, by its content: the bytes of equal contents differ.
    """
    found = files(place, "run/*", "run/snapshots/*")
    newest = max((place / "run" / "checkpoints").glob("step-*.pt"), default=None)
    if newest is not None:
        found["checkpoint"] = (newest.name, plain(torch.load(newest, weights_only=True)))
    lines = [json.loads(line) for line in found.pop("run/metrics.jsonl", b"").splitlines()]
    found["metrics"] = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return found


def plain(value: Any) -> Any:
    """Turn tensors within `value` into bytes, which can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def said_of(place: Path) -> dict[str, Any]:
    """Nothing: a command that leaves no file."""
    return {}


def reported(place: Path) -> dict[str, Any]:
    """Page and figures, the page without what names the time and the machine."""
    found = files(place, "run/report.html", "run/figures/*", "run/evaluation.json")
    return {name: len(content) > 100 if name.endswith("report.html") else content for name, content in found.items()}


SCENARIOS = (
    Scenario("train", train_words, trained, 24),
    Scenario("resume", train_words, trained, 20),
    Scenario(
        "pairs",
        lambda place: ["data", "pairs", str(place / "source"), "--output", str(place / "built"), "--workers", "1"],
        lambda place: files(place, "built/*"),
        20,
    ),
    Scenario("index", lambda place: ["data", "index", str(place / "data")], lambda place: files(place, "data/*"), 8),
    Scenario("load", lambda place: ["load", str(place / "run")], said_of, 4),
    Scenario(
        "eval",
        lambda place: ["eval", str(place / "run")],
        lambda place: files(place, "run/evaluation.json"),
        10,
    ),
    Scenario("report", lambda place: ["report", str(place / "run")], reported, 5),
)


def make_bench(folder: Path) -> Bench:
    """Make the states before each command."""
    bench = Bench(folder)
    states = {scenario.name: bench.states / scenario.name for scenario in SCENARIOS}
    write_tars(states["train"] / "data")
    shutil.copytree(states["train"], states["index"])
    write_source(states["pairs"] / "source")
    train = SCENARIOS[0]
    calls, _ = bench.calls(train)
    # A run that was killed in the middle of its second checkpoint.
    second = next(call.number for call in calls if call.kind == "fsync" and "step-00000004.pt" in call.path)
    bench.begin(train)
    assert bench.server.run(train_words(bench.place), bench.place, second, KILL)["code"] == -signal.SIGKILL
    shutil.copytree(bench.place, states["resume"])
    # A finished run on built data; the builder writes the dataset.json that `eval` reads.
    shutil.copytree(states["pairs"], bench.place, dirs_exist_ok=True)
    shutil.rmtree(bench.place)
    bench.place.mkdir()
    write_source(bench.place / "source")
    built = ["data", "pairs", str(bench.place / "source"), "--output", str(bench.place / "data"), "--workers", "1"]
    for argv in (
        [*built, "--validation-percent", "30"],
        train_words(bench.place),
        ["eval", str(bench.place / "run")],
    ):
        done = bench.server.run(argv, bench.place)
        assert done["code"] == 0, done["said"]
    for name in ("load", "eval", "report"):
        shutil.copytree(bench.place, states[name])
    return bench
