import collections
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from oner_fast.train.engine.checkpoint import (
    DamagedCheckpoint,
    check,
    latest,
    load,
    prepare,
    random_state,
    save,
    saved,
    set_random_state,
)


def same(one, other):
    """Whether two states hold the same values, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


def names(folder):
    return [path.name for path in saved(folder)]


def test_round_trip_of_a_training_state(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": [random_state()],
        "data": {"seed": 1, "position": (2, 3.5), "name": "x", "none": None},
        "dtype": torch.bfloat16,
    }
    path = save(tmp_path / "run" / "checkpoints", 500, state, keep=2)
    assert path.name == "step-00000500.pt"
    got = load(path)
    assert got["step"] == 500 and got["data"] == state["data"] and got["dtype"] is torch.bfloat16
    assert set(got) == {*state, "step"}
    torch.testing.assert_close(got["model"], dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(got["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert got["random"][0]["python"] == random.getstate()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (numpy.float64(1.0), r"state\['a'\]\['b'\]: a checkpoint cannot hold a numpy.float64"),
        (numpy.zeros(2), "numpy.ndarray"),
        ({"c": [1, {2}]}, r"state\['a'\]\['b'\]\['c'\]\[1\]: a checkpoint cannot hold a builtins.set"),
        (collections.defaultdict(int), "defaultdict"),
        ({(1, 2): 3}, "keys must be str or int"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value, text):
    with pytest.raises(TypeError, match=text):
        save(tmp_path, 1, {"a": {"b": value}}, keep=1)
    assert os.listdir(tmp_path) == []


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="own keys, got step"):
        save(tmp_path, 1, {"step": 1}, keep=1)
    with pytest.raises(ValueError, match="keep=-1"):
        save(tmp_path, 1, {}, keep=-1)


def test_pruning_keeps_the_last_and_the_one_just_written(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {"x": step}, keep=2)
    assert names(tmp_path) == ["step-00000003.pt", "step-00000004.pt"]
    # A run continued from an older step writes below the newest.
    save(tmp_path, 2, {"x": 2}, keep=2)
    assert names(tmp_path) == ["step-00000002.pt", "step-00000003.pt", "step-00000004.pt"]
    save(tmp_path, 5, {"x": 5}, keep=0)
    assert len(names(tmp_path)) == 4
    assert all(name.startswith("step-") for name in os.listdir(tmp_path))


def test_an_interrupted_save_leaves_no_trace(tmp_path, monkeypatch):
    save(tmp_path, 1, {"x": 1}, keep=1)

    def interrupted(value, file):
        file.write(b"PK half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, {"x": 2}, keep=1)
    assert os.listdir(tmp_path) == ["step-00000001.pt"]


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def damage_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_bit(path):
    data = bytearray(path.read_bytes())
    position = data.index(torch.full((2000,), 7.0).numpy().tobytes()) + 4000
    data[position] ^= 4
    path.write_bytes(bytes(data))


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_cut, damage_half, damage_bit, damage_empty])
def test_damage_is_refused_and_latest_falls_back(tmp_path, caplog, damage):
    # The CRC is written even where somebody switched it off for other files.
    torch.serialization.set_crc32_options(False)
    try:
        for step in (1, 2):
            save(tmp_path, step, {"x": torch.full((2000,), 7.0)}, keep=5)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    newest = tmp_path / "step-00000002.pt"
    assert latest(tmp_path) == newest
    damage(newest)
    with pytest.raises(DamagedCheckpoint, match=r"step-00000002\.pt is damaged"):
        load(newest)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step-00000001.pt"
    assert "step-00000002.pt is damaged" in caplog.text and "falling back" in caplog.text
    damage(tmp_path / "step-00000001.pt") if damage is not damage_bit else damage_cut(tmp_path / "step-00000001.pt")
    with pytest.raises(DamagedCheckpoint, match="all 2 checkpoints"):
        latest(tmp_path)


def test_a_flipped_byte_anywhere_is_found_or_harmless(tmp_path):
    """Padding and dates do not matter; all else must be noticed by `check`, before anything is restored."""
    path = save(tmp_path, 6, {"x": torch.arange(40.0), "name": "a"}, keep=1)
    whole, good = path.read_bytes(), load(path)
    noticed = 0
    directory = whole.index(b"PK\1\2")  # metadata that no checksum covers, from here to the end
    places = [*range(0, directory, 3), *range(directory, len(whole))]
    # 0x10 alone turns a member into a directory, which torch reads as uninitialised memory.
    for position, bits in [(place, 0xFF) for place in places] + [(place, 0x10) for place in places[directory // 3 :]]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bits]) + whole[position + 1 :])
        try:
            check(path)
        except DamagedCheckpoint:
            noticed += 1
        else:
            assert same(load(path), good), position
    assert noticed > 500


@pytest.mark.parametrize("length", [1, 21, 22, 100, 0.5, 0.99, -1])
def test_a_cut_file_is_damaged_and_does_not_count(tmp_path, length):
    for step in (1, 2, 3):
        save(tmp_path, step, {"x": torch.zeros(500)}, keep=0)
    path = tmp_path / "step-00000003.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(length * len(data)) if isinstance(length, float) else length])
    with pytest.raises(DamagedCheckpoint):
        check(path)
    save(tmp_path, 4, {}, keep=2)
    assert names(tmp_path) == [f"step-0000000{step}.pt" for step in (2, 3, 4)]


def test_a_member_that_is_compressed_is_refused_before_it_expands(tmp_path):
    path = tmp_path / "step-00000001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(DamagedCheckpoint, match="is compressed"):
        check(path)


def test_too_many_open_files_do_not_make_a_checkpoint_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, {}, keep=1)

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many"):
        patched.setattr(os, "open", refuse)
        latest(tmp_path)
    assert latest(tmp_path) is not None


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path, 1, {}, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        save(tmp_path, 2, {}, keep=1)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert "step-00000001.pt cannot be removed: Permission denied" in caplog.text


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load(tmp_path / "step-00000001.pt")
    torch.save({"model": 1}, tmp_path / "other.pt")
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint of this library"):
        load(tmp_path / "other.pt")
    torch.save(random.Random(), tmp_path / "code.pt")
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        load(tmp_path / "code.pt")


CHILD = """
import os, sys, time
import torch
from oner_fast import atomic
from oner_fast.train.engine import checkpoint

folder, stage = sys.argv[1:]
state = {"x": torch.arange(1000)}
checkpoint.save(folder, 1, state, keep=1)

def hang(*_):
    print("now", flush=True)
    time.sleep(60)

def half(value, file):
    file.write(b"PK" + bytes(5000))
    file.flush()
    hang()

if stage == "writing":
    torch.save = half
elif stage == "before the rename":
    os.replace = hang
elif stage == "before the directory is on disk":
    atomic.sync_directory = hang
else:
    checkpoint._prune = hang
checkpoint.save(folder, 2, state, keep=1)
"""


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("writing", 1),
        ("before the rename", 1),
        ("before the directory is on disk", 2),
        ("before older ones are removed", 2),
    ],
)
def test_sigkill_in_the_middle_of_a_save(tmp_path, stage, expected):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), stage], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "now\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    for step in range(1, expected + 1):
        assert torch.equal(load(tmp_path / f"step-{step:08d}.pt")["x"], torch.arange(1000))
    assert latest(tmp_path) == tmp_path / f"step-{expected:08d}.pt"
    leftovers = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(leftovers) == (1 if expected == 1 else 0)
    prepare(tmp_path)
    assert all(name.startswith("step-") for name in os.listdir(tmp_path))
    save(tmp_path, 3, {}, keep=1)
    assert os.listdir(tmp_path) == ["step-00000003.pt"]


def test_every_generator_continues_where_it_was(tmp_path):
    random.gauss(0, 1)
    numpy.random.standard_normal(3)
    path = save(tmp_path, 1, {"random": random_state()}, keep=1)

    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.standard_normal(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    set_random_state(load(path)["random"])
    assert draw() == first
