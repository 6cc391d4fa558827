"""Ten steps are five, a kill, and five more: the same bits, with two threads and two workers."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast.train.engine import checkpoint
from oner_fast.train.oner import __main__ as oner

TIMES = {"seconds", "samples_per_second", "data_wait", "mfu"}

# A run that does something of its own at a step: argv is what to do, then the command line.
CHILD = """
import os, signal, sys, torch
from oner_fast.train.oner import __main__ as oner
from oner_fast.train.oner import step

do, calls, save = sys.argv[1], [], torch.save
original = step.TrainingStep.__call__

def counted(self, batch):
    calls.append(batch.step)
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 2
    if do == "SIGTERM" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, batch)

def half(value, file):
    if len(calls) < 6:
        return save(value, file)
    file.write(b"PK" + bytes(5000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

step.TrainingStep.__call__ = counted
if do == "SIGKILL":
    torch.save = half
sys.exit(oner.main(sys.argv[2:]))
"""


def make_pairs(folder: Path, count: int = 21) -> Path:
    """Two shards of drawn pictures, an epoch of two batches and a remainder."""
    folder.mkdir()
    colours = ["red", "green", "blue", "grey", "pink"]
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for i in range(shard * count // 2, (shard + 1) * count // 2):
                png = io.BytesIO()
                Image.new("RGB", (20, 14 + i), (12 * i, 255 - 12 * i, 7 * i)).save(png, "PNG")
                caption = f"a {colours[i % 5]} picture of size {i} in {colours[i % 3]}"
                for name, data in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def command(data: Path, run: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "train_data": data, "run_dir": run, "image_size": 12, "patch_size": 4, "width": 16, "depth": 1, "heads": 2,
        "embed_dim": 8, "projector_hidden": 16, "predictor_hidden": 16, "max_text_tokens": 8, "tokenizer_vocab": 80,
        "batch_size": 8, "steps": 10, "warmup": 2, "save_every": 3, "log_every_n_steps": 1, "snapshot_every": 0,
        "workers": 2, "threads": 2, "precision": "fp32", "device": "cpu", "accum_freq": 2,
        "teacher_view": "second", "keep_checkpoints": 3,
    }  # fmt: skip
    words = []
    for name, value in {**settings, **changes}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["OMP_WAIT_POLICY"] = "passive"  # three runs share the processor
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(children: list[subprocess.Popen[str]], expected: list[int]) -> list[str]:
    try:
        outputs = [child.communicate(timeout=150)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == expected, "\n".join(outputs)
    return outputs


class Runs:
    """Four runs of the same training: straight, and taken up again after SIGTERM, SIGKILL, and with other workers."""

    def __init__(self, folder: Path) -> None:
        self.data = make_pairs(folder / "pairs")
        self.straight, self.stopped, self.killed, self.other = (
            folder / name for name in ("straight", "stopped", "killed", "other")
        )
        finish(
            [
                start("-m", "oner_fast.train.oner", *command(self.data, self.straight)),
                start("-c", CHILD, "SIGTERM", *command(self.data, self.stopped)),
                start("-c", CHILD, "SIGKILL", *command(self.data, self.killed)),
            ],
            [0, 143, -signal.SIGKILL],
        )
        self.after_sigterm = sorted(os.listdir(self.stopped / "checkpoints"))
        self.after_sigkill = sorted(os.listdir(self.killed / "checkpoints"))
        self.finished_early = [(run / "model.safetensors").exists() for run in (self.stopped, self.killed)]
        shutil.copytree(self.stopped, self.other)
        self.outputs = finish(
            [
                start("-m", "oner_fast.train.oner", *command(self.data, self.stopped)),
                start("-m", "oner_fast.train.oner", *command(self.data, self.killed)),
            ],
            [0, 0],
        )
        assert oner.main(command(self.data, self.other, workers=0)) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs above, once."""
    return Runs(tmp_path_factory.mktemp("runs"))


def test_sigterm_saves_the_step_and_sigkill_leaves_the_last_whole_one(runs: Runs) -> None:
    assert runs.after_sigterm == ["step-00000003.pt", "step-00000005.pt"]
    assert [name for name in runs.after_sigkill if name.endswith(".pt")] == ["step-00000003.pt"]
    assert len(runs.after_sigkill) == 2 and runs.after_sigkill[0].endswith(".tmp")
    assert runs.finished_early == [False, False]
    assert "resumed after step 5" in runs.outputs[0] and "resumed after step 3" in runs.outputs[1]
    assert not any(name.endswith(".tmp") for name in os.listdir(runs.killed / "checkpoints"))


@pytest.mark.parametrize("name", ["stopped", "killed", "other"])
def test_the_model_is_the_same_bytes(runs: Runs, name: str) -> None:
    run = getattr(runs, name)
    assert (run / "model.safetensors").read_bytes() == (runs.straight / "model.safetensors").read_bytes()
    assert (run / "tokenizer.json").read_bytes() == (runs.straight / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["stopped", "killed", "other"])
def test_the_last_checkpoint_is_the_same_state(runs: Runs, name: str) -> None:
    """Student, teacher, optimiser, generators, guard and place in the data."""
    one, other = (checkpoint.load(run / "checkpoints/step-00000010.pt") for run in (runs.straight, getattr(runs, name)))
    assert set(one) == set(other) and one["step"] == 10
    assert one["optimizer"]["state"] and one["student"] and one["teacher"]
    for state in (one, other):
        state["config"] = json.loads(state["config"])
        del state["config"]["run"]["run_dir"], state["config"]["data"]["workers"]
    pairs = [("", one, other)]
    compared = 0
    while pairs:
        where, left, right = pairs.pop()
        assert type(left) is type(right), where
        if isinstance(left, dict):
            assert left.keys() == right.keys(), where
            pairs += [(f"{where}.{key}", value, right[key]) for key, value in left.items()]
        elif isinstance(left, (list, tuple)):
            assert len(left) == len(right), where
            pairs += [(f"{where}[{i}]", *both) for i, both in enumerate(zip(left, right, strict=True))]
        elif isinstance(left, torch.Tensor):
            compared += 1
            assert torch.equal(left, right), where
        else:
            assert left == right, where
    assert compared > 100


@pytest.mark.parametrize("name", ["stopped", "killed", "other"])
def test_the_metrics_are_the_same_lines(runs: Runs, name: str) -> None:
    def lines(run: Path) -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMES} for line in parsed]

    expected = lines(runs.straight)
    assert [line["step"] for line in expected] == list(range(1, 11))
    assert {"loss", "loss/itc", "loss/cmc", "loss/mlm", "loss/mim", "lr", "grad_norm", "momentum",
            "epoch", "skipped_steps", "corrupt_samples"} <= set(expected[0])  # fmt: skip
    assert [line["epoch"] for line in expected] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({line["loss"] for line in expected}) == 10 and expected[-1]["loss"] < expected[0]["loss"]
    assert lines(getattr(runs, name)) == expected


def test_a_finished_run_is_left_as_it_is_and_loads(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    before = (runs.straight / "model.safetensors").read_bytes()
    contrast = (runs.straight / "contrast.safetensors").read_bytes()
    for other in (runs.stopped, runs.killed):
        assert (other / "contrast.safetensors").read_bytes() == contrast
    (runs.straight / "contrast.safetensors").unlink()  # as in a run of an earlier version
    assert oner.main(command(runs.data, runs.straight)) == 0
    assert (runs.straight / "model.safetensors").read_bytes() == before
    assert (runs.straight / "contrast.safetensors").read_bytes() == contrast
    assert len((runs.straight / "metrics.jsonl").read_text().splitlines()) == 10
    loaded = oner_fast.load(runs.straight)
    assert loaded.encode_text(["a red picture"]).shape == (1, 8)
    student = checkpoint.load(runs.straight / "checkpoints/step-00000010.pt")["student"]
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, student[f"tower.{name}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 0.5},
            "was trained with other settings (lr 0.001 -> 0.5); to train on, begin a new phase with --resume",
        ),
        ({"seed": 3, "itc": 0.5}, "(itc 1.0 -> 0.5; seed 0 -> 3)"),
        ({"steps": 20}, "(steps 10 -> 20)"),
        ({"width": 32}, "(width 16 -> 32)"),
        ({"aug_scale": 0.9}, "(aug_scale 0.6 -> 0.9)"),
        ({"resume": "none"}, "holds 3 checkpoints up to step-00000010.pt; resume with --resume latest"),
        ({"resume": "step-7.pt"}, "give latest, none, or the path of a step-*.pt file or a run"),
        ({"train_data": "/nowhere"}, "no dataset at '/nowhere'"),
        ({"batch_size": 64}, "64"),
    ],
)
def test_a_command_that_would_not_continue_the_run_is_refused(
    runs: Runs, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    before = {path: path.read_bytes() for path in runs.straight.rglob("*") if path.is_file()}
    assert oner.main(command(runs.data, runs.straight, **changes)) == 1
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in runs.straight.rglob("*") if path.is_file()} == before
