"""A rank that ends or stops is named by the others, within the time limit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from oner_fast.train.engine.distributed import World, on_main, setup, shutdown, sum_over_ranks
from oner_fast.train.engine.lost_ranks import LostRank, lost_ranks_named

TIMEOUT = 3.0
# scenario: number of ranks, the lost rank, the signal it gets, the time limit
SCENARIOS = {
    "stopped": (2, 1, signal.SIGSTOP, TIMEOUT),
    "the first stopped": (2, 0, signal.SIGSTOP, TIMEOUT),
    "killed": (3, 1, signal.SIGKILL, 600.0),
    "the first killed": (2, 0, signal.SIGKILL, 600.0),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """All scenarios at once, in processes forked from one that has imported torch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("TORCHELASTIC")}
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return {"output": {"text": done.stdout + done.stderr}, **json.loads((folder / "outcomes").read_text())}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_lost_rank_is_named_in_time(name: str, outcomes: dict[str, dict[str, object]]) -> None:
    size, lost, how, limit = SCENARIOS[name]
    for rank in range(size):
        found = outcomes.get(f"{name} {rank}")
        if rank == lost:
            assert found is None
            continue
        assert found is not None
        said, seconds = str(found["said"]), float(str(found["seconds"]))
        if how is signal.SIGSTOP:
            assert said.startswith(f"rank {rank} waited 3 s (--collective-timeout) and rank {lost} did not take part")
            assert seconds < 3 * TIMEOUT
        else:
            assert said.startswith(f"rank {rank} lost the connection to rank {lost}, which ended first")
            assert seconds < 20


def test_nothing_else_is_printed(outcomes: dict[str, dict[str, object]]) -> None:
    assert outcomes["output"]["text"] == ""


def test_an_error_of_the_main_rank_is_raised_on_every_rank(outcomes: dict[str, dict[str, object]]) -> None:
    for rank in range(2):
        assert outcomes[f"main {rank}"]["said"] == [
            "7",
            "ValueError: bad data",
            "FileNotFoundError: [Errno 2] No such file or directory: 'x'",
            "RuntimeError: Odd: 1 and 2",
        ]


def test_other_errors_pass_through() -> None:
    alone = World(0, 1, 0, torch.device("cpu"))
    for error in (RuntimeError("shapes differ"), ValueError("gloo"), RuntimeError("Connection closed by peer")):
        with pytest.raises(type(error), match=str(error)), lost_ranks_named(alone, 1.0):
            raise error


def test_ranks_that_do_not_come_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"rank 0 did not meet the other 1 at 127.* within 1 s \(--collective-timeout"):
        setup("cpu", timeout_seconds=1.0)


class Odd(Exception):
    """An error that cannot be built from its text alone."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def main_rank(world: World) -> list[str]:
    def fail(error: Exception) -> None:
        raise error

    said = [str(on_main(world, lambda: world.rank + 7))]
    for error in (ValueError("bad data"), FileNotFoundError(2, "No such file or directory", "x"), Odd(1, 2)):
        try:
            on_main(world, lambda error=error: fail(error))  # type: ignore[misc]
        except Exception as caught:
            said.append(f"{type(caught).__name__}: {caught}")
    return said


def rank_main(scenario: str, rank: int, port: int, folder: Path) -> None:
    size, lost, how, limit = SCENARIOS.get(scenario, (2, None, signal.SIGKILL, 600.0))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = setup("cpu", timeout_seconds=limit)
    said: object = None
    begin = time.monotonic()
    if lost is None:
        said = main_rank(world)
    else:
        try:
            with lost_ranks_named(world, limit):
                sum_over_ranks(torch.zeros(3))
                if rank == lost:
                    os.kill(os.getpid(), how)
                begin = time.monotonic()
                sum_over_ranks(torch.zeros(3))
        except LostRank as error:
            said = str(error)
    (folder / f"{scenario} {rank}").write_text(json.dumps({"said": said, "seconds": time.monotonic() - begin}))
    shutdown()


def start_all(folder: Path) -> None:
    children, lost_ones = [], []
    for scenario, (size, lost, _, _) in {**SCENARIOS, "main": (2, None, signal.SIGKILL, 0.0)}.items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    rank_main(scenario, rank, port, folder)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            (lost_ones if rank == lost else children).append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    for child in lost_ones:
        os.kill(child, signal.SIGKILL)
    assert codes == [0] * len(children), codes
    found = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    (folder / "outcomes").write_text(json.dumps(found))


if __name__ == "__main__":
    start_all(Path(sys.argv[1]))
