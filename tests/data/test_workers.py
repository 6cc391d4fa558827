"""Workers ignore signals, which the training process handles, and never outlive it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import os, signal, sys, time
from pathlib import Path
import torch
from oner_fast.data.dataset import PairDataset
from oner_fast.data.loader import PairLoader
from oner_fast.data.tokenizer import Tokenizer

torch.set_num_threads(2)  # as a training does: a forked worker then has a pool of threads from the start
stop = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(number))
dataset = PairDataset(sys.argv[1])
loader = PairLoader(dataset, Tokenizer.train('up down left right', 200), batch_size=8, seed=1, image_size=16, workers=2)
next(loader)
children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
print(children, flush=True)
if sys.argv[2:] == ["leave"]:
    sys.exit()
if sys.argv[2:] == ["sleep"]:
    time.sleep(60)  # prefetched batches stay unread
while len(stop) < 4:
    next(loader)
    time.sleep(0.01)
for _ in range(20):
    next(loader)
loader.close()
print("ended well", flush=True)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: list[int], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not any(map(alive, processes)):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def run(tars, tmp_path):
    started = []

    def start(*arguments: str) -> tuple[subprocess.Popen, list[int]]:
        # The captions are so long that a worker's result pipe is full, and the worker waits for a reader.
        members = [(name, data * 2000 if name.endswith("txt") else data) for name, data in tars.pairs(range(20))]
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tars.write(tmp_path / "long.tar", members)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, [int(child) for child in process.stdout.readline().split()]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
class TestWorkers:
    def test_workers_end_when_the_training_process_is_killed(self, run):
        process, workers = run("sleep")
        os.kill(workers[0], signal.SIGTERM)  # not from the training process, so it is ignored
        time.sleep(0.5)
        assert len(workers) == 2 and all(map(alive, workers))
        process.kill()
        assert gone(workers, 6)

    def test_workers_continue_when_the_whole_group_is_signalled(self, run):
        process, workers = run()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
        os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does
        os.killpg(process.pid, signal.SIGHUP)  # as a session does that ends
        os.killpg(process.pid, signal.SIGUSR1)  # as SLURM does before it ends a job
        out, errors = process.communicate(timeout=60)
        assert out == "ended well\n" and process.returncode == 0, errors
        assert gone(workers, 6)

    def test_workers_end_quietly_when_the_program_ends(self, run):
        process, workers = run("leave")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and errors == "" and gone(workers, 6)
