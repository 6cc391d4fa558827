"""Whole trainings whose process group is signalled, whose folder is taken, or whose newest checkpoint is damaged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from oner_fast.train.engine import checkpoint
from oner_fast.train.oner import __main__ as oner

# signals to the group, --threads, workers, whether they come before the first step
STOPS: dict[str, tuple[tuple[str, ...], int | str, int, bool]] = {
    "SIGTERM": (("SIGTERM",), "auto", 2, False),
    "SIGHUP": (("SIGHUP",), 2, 4, False),
    "SIGUSR1": (("SIGUSR1",), 1, 1, False),
    "SIGUSR1-then-others": (("SIGUSR1", "SIGTERM", "SIGHUP", "SIGTERM", "SIGINT"), 2, 1, False),
    "SIGTERM-alone": (("SIGTERM",), 2, 0, False),
    "SIGHUP-early": (("SIGHUP",), 1, 2, True),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All trainings, forked from one process that has imported torch."""
    folder = tmp_path_factory.mktemp("stopping")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["OMP_WAIT_POLICY"] = "passive"
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "outcomes").read_text())
    return found


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_to_the_group_saves_and_exits(outcomes: dict[str, Any], name: str) -> None:
    signals, _, _, early = STOPS[name]
    found = outcomes[name]
    # Of signals that arrive together, any may be the first that Python sees.
    stopped, step = re.findall(r"(SIG\w+): saved step (\d+); the same command continues", found["said"])[0]
    assert stopped in signals and found["status"] == 128 + signal.Signals[stopped], found["said"]
    assert found["checkpoints"] == [f"step-{int(step):08d}.pt"]
    assert found["files"] == ["checkpoints", "config.json", "metrics.jsonl", "run.json", "tokenizer.json"]
    assert (step == "1") == early and "Traceback" not in found["said"]


def test_the_number_of_threads_is_recorded_in_the_run_and_in_its_checkpoint(outcomes: dict[str, Any]) -> None:
    for name, (_, asked, _, _) in STOPS.items():
        record = outcomes[name]["threads"]
        assert record["asked"] == asked and record["used"] == outcomes[name]["saved"]["threads"]
        assert record["used"] == asked or (asked == "auto" and record["used"] >= 1)


def test_a_second_training_in_the_folder_says_who_holds_it(outcomes: dict[str, Any]) -> None:
    found = outcomes["second"]
    assert found["status"] == 1
    assert re.search(r"oner-fast train oner: .*/SIGTERM is in use by process \d+ on ", found["said"]), found["said"]
    assert outcomes["dry run"]["status"] == 0, outcomes["dry run"]["said"]


def test_two_ranks_go_on_from_the_checkpoint_before_a_damaged_one(outcomes: dict[str, Any]) -> None:
    for rank in range(2):
        assert outcomes[f"rank {rank}"]["status"] == 0, outcomes[f"rank {rank}"]["said"]
    said = outcomes["rank 0"]["said"]
    assert said.count("it is now step-00000004.pt.damaged, and the run goes on from step-00000002.pt") == 1
    assert "resumed after step 2" in said and "damaged" not in outcomes["rank 1"]["said"]
    assert outcomes["rank 0"]["checkpoints"] == ["step-00000002.pt", "step-00000004.pt", "step-00000004.pt.damaged"]


def make_pairs(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(32):
            png = io.BytesIO()
            Image.new("RGB", (12, 12), (7 * i, 255 - 7 * i, 99)).save(png, "PNG")
            for name, data in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", f"picture {i % 5} of {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def command(folder: Path, name: str, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "train_data": folder / "pairs.tar", "run_dir": folder / name, "image_size": 12, "patch_size": 4, "width": 16,
        "depth": 1, "heads": 2, "embed_dim": 8, "projector_hidden": 16, "predictor_hidden": 16, "max_text_tokens": 8,
        "tokenizer_vocab": 80, "batch_size": 8, "steps": 100000, "warmup": 1, "save_every": 100000,
        "log_every_n_steps": 1, "snapshot_every": 0, "workers": 0, "threads": 1, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    words = [f"--{key.replace('_', '-')}={value}" for key, value in {**settings, **changes}.items()]
    return [*(word for word in words if not word.endswith("=True")), *(w[:-5] for w in words if w.endswith("=True"))]


class Child:
    """A training in a process group of its own."""

    started: ClassVar[list[int]] = []

    def __init__(self, folder: Path, name: str, environment: dict[str, str] | None = None, **changes: Any) -> None:
        self.said = folder / f"{name}.out"
        self.run = Path(str(changes.get("run_dir", folder / name)))
        words = command(folder, name, **changes)
        self.said.touch()
        self.process = os.fork()
        if self.process == 0:
            try:
                os.setsid()
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
                os.environ |= environment or {}
                out = os.open(self.said, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                status = oner.main(words)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                status = 99
            os._exit(status)
        self.started.append(self.process)

    def wait_for(self, there: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not there():
            assert time.monotonic() < limit and os.waitpid(self.process, os.WNOHANG) == (0, 0), self.said.read_text()
            time.sleep(0.005)

    def outcome(self) -> dict[str, Any]:
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        checkpoints = self.run / "checkpoints"
        saved = sorted(checkpoints.glob("step-*.pt"))
        return {
            "threads": json.loads((self.run / "run.json").read_text())["threads"],
            "saved": {"threads": checkpoint.load(saved[-1])["threads"]} if saved else {},
            "status": status,
            "said": self.said.read_text(),
            "checkpoints": sorted(os.listdir(checkpoints)) if checkpoints.is_dir() else [],
            "files": sorted(name for name in os.listdir(self.run) if name != "tensorboard"),
        }


def stop_all(folder: Path) -> dict[str, Any]:
    found = {}
    for name, (signals, threads, workers, early) in STOPS.items():
        child = Child(folder, name, threads=threads, workers=workers)
        if early:
            child.wait_for((child.run / "run.lock").exists)
        else:
            child.wait_for(lambda child=child: "step      3/" in child.said.read_text())  # type: ignore[misc]
        if name == "SIGTERM":
            second, dry = Child(folder, "second", run_dir=child.run), Child(folder, "dry", dry_run=True)
            found["second"] = {"status": os.waitstatus_to_exitcode(os.waitpid(second.process, 0)[1])}
            found["second"]["said"] = second.said.read_text()
            found["dry run"] = {"status": os.waitstatus_to_exitcode(os.waitpid(dry.process, 0)[1])}
            found["dry run"]["said"] = dry.said.read_text()
        for each in signals:
            os.killpg(child.process, signal.Signals[each])
        found[name] = child.outcome()
    return found


def two_ranks(folder: Path) -> dict[str, Any]:
    settings = {"run_dir": folder / "ranks", "steps": 4, "save_every": 2}
    assert Child(folder, "before", **settings).outcome()["status"] == 0
    newest = folder / "ranks" / "checkpoints" / "step-00000004.pt"
    data = newest.read_bytes()
    newest.write_bytes(data[: len(data) // 3])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Child(folder, f"rank {rank}", {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **settings)
        for rank in range(2)
    ]
    return {f"rank {rank}": child.outcome() for rank, child in enumerate(ranks)}


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401  # once, instead of in every child
    here = Path(sys.argv[1])
    make_pairs(here / "pairs.tar")
    try:
        everything = stop_all(here) | two_ranks(here)
    finally:
        for group in Child.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    (here / "outcomes").write_text(json.dumps(everything))
