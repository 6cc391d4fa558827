"""A damaged newest checkpoint never blocks a run: it is moved aside, and the one before is used."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from oner_fast.train.engine import checkpoint
from oner_fast.train.engine.checkpoint import DamagedCheckpoint
from oner_fast.train.engine.resuming import find_start, restoring
from oner_fast.train.engine.verify import main as verify


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("kept")


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(path.parent)  # the address of a socket may have 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "is damaged, cut short or unreadable"),
    "empty": (lambda path: path.write_bytes(b"") and None, "is empty"),
    "flipped bit": (flip, "checksum of its member"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)) and None, "is damaged, cut short"),
    "a page": (lambda path: path.write_bytes(b"<html>gone</html>") and None, "is damaged, cut short"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"step": 6})) and None, "is damaged, cut short"),
    "another pickle in a zip": (lambda path: torch.save(Path("x"), path), "cannot be read as a checkpoint"),
    "another model": (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of this library"),
    "a step in words": (lambda path: torch.save({"step": "six", "format": 1}, path), "is not a checkpoint"),
    "another step's": (
        lambda path: path.write_bytes(path.with_name("step-00000002.pt").read_bytes()) and None,
        "holds step 2, which is not the step of its name",
    ),
    "a list": (lambda path: torch.save([1, 2], path), "is not a checkpoint of this library"),
    "directory": (replaced(full_directory), "is a directory"),
    "named pipe": (replaced(os.mkfifo), "is a named pipe"),
    "socket": (replaced(listen), "is a socket"),
    "device": (replaced(lambda path: path.symlink_to("/dev/zero")), "is a device"),
    "link to itself": (replaced(lambda path: path.symlink_to(path.name)), "is a loop of symbolic links"),
    "link to nothing": (replaced(lambda path: path.symlink_to("nowhere.pt")), "a file that does not exist"),
    "link to a pipe": (
        replaced(lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))),
        "is a named pipe",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoints 2, 4 and 6 of a run."""
    for step in (2, 4, 6):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, {"x": torch.full((500,), float(step))}, keep=0)
    return tmp_path / "run" / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "pipe")


@pytest.mark.parametrize("resume", ["latest", "run"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_is_used_and_the_damaged_one_is_kept_aside(
    folder: Path, kind: str, resume: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGES[kind]
    damage(folder / "step-00000006.pt")
    start = find_start(folder, str(folder.parent) if resume == "run" else resume)
    assert start.path == folder / "step-00000004.pt"
    assert verify(["verify", str(folder.parent)]) == 1
    listed = capsys.readouterr().out
    assert reason in listed and "2 whole, 1 damaged" in listed
    with caplog.at_level(logging.WARNING):
        start.set_aside()
    (line,) = caplog.messages
    assert reason in line and "it is now step-00000006.pt.damaged" in line and "from step-00000004.pt" in line
    assert names(folder) == ["step-00000002.pt", "step-00000004.pt", "step-00000006.pt.damaged"]
    assert verify(["verify", str(folder)]) == 0
    assert "set aside before: step-00000006.pt.damaged" in capsys.readouterr().out
    # The damaged one does not count: two whole ones stay.
    checkpoint.save(folder, 6, {}, keep=2, damaged=start.damaged)
    assert [path.name for path in checkpoint.saved(folder)] == ["step-00000004.pt", "step-00000006.pt"]


def test_an_earlier_damaged_one_is_never_overwritten(folder: Path) -> None:
    contents = []
    for number in range(3):
        path = folder / "step-00000006.pt"
        contents.append(b"damage %d" % number)
        path.write_bytes(contents[-1])
        find_start(folder, "latest").set_aside()
    kept = [folder / f"step-00000006.pt.damaged{suffix}" for suffix in ("", ".2", ".3")]
    assert [path.read_bytes() for path in kept] == contents


def test_several_damaged_ones_are_passed_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(folder / "step-00000006.pt")
    cut(folder / "step-00000004.pt")
    start = find_start(folder, "latest")
    start.set_aside()
    assert start.path == folder / "step-00000002.pt" and len(caplog.messages) == 2
    assert names(folder) == ["step-00000002.pt", "step-00000004.pt.damaged", "step-00000006.pt.damaged"]


def test_where_all_are_damaged_nothing_is_moved_until_a_fresh_start_is_asked_for(folder: Path) -> None:
    for step in (2, 4, 6):
        cut(folder / f"step-0000000{step}.pt")
    before = names(folder)
    with pytest.raises(DamagedCheckpoint, match=r"all 3 checkpoints in .* --resume none moves them aside"):
        find_start(folder, "latest")
    assert names(folder) == before
    start = find_start(folder, "none")
    assert start.path is None
    start.set_aside()
    assert names(folder) == [f"{name}.damaged" for name in before]


def test_an_unreadable_one_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refuse(path: object, *rest: int) -> int:
        if str(path).endswith("step-00000006.pt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    start = find_start(folder, "latest")
    assert start.path == folder / "step-00000004.pt"
    assert "unreadable: Permission denied" in start.damaged[folder / "step-00000006.pt"]


@contextmanager
def no_renaming(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        yield


def test_one_that_cannot_be_moved_is_named_and_does_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flip(folder / "step-00000006.pt")
    start = find_start(folder, "latest")
    with no_renaming(monkeypatch):
        start.set_aside()
    assert "cannot be moved aside (Read-only file system), and the run goes on from step-00000004.pt" in caplog.text
    checkpoint.save(folder, 5, {}, keep=2, damaged=start.damaged)
    assert names(folder) == ["step-00000004.pt", "step-00000005.pt", "step-00000006.pt"]


def test_only_whole_newer_ones_forbid_an_older_start(folder: Path) -> None:
    older = folder / "step-00000004.pt"
    with pytest.raises(ValueError, match=r"holds 3 checkpoints up to step-00000006\.pt; resume with --resume latest"):
        find_start(folder, str(older))
    flip(folder / "step-00000006.pt")
    start = find_start(folder, str(older))
    assert start.path == older and set(start.damaged) == {folder / "step-00000006.pt"}
    with pytest.raises(ValueError, match=r"up to step-00000004\.pt"):
        find_start(folder, "none")


def test_a_damaged_file_that_was_asked_for_is_refused_and_other_folders_are_left_alone(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = folder / "step-00000006.pt"
    flip(newest)
    with pytest.raises(DamagedCheckpoint, match=r"step-00000006\.pt is damaged"):
        find_start(tmp_path / "other" / "checkpoints", str(newest))
    start = find_start(tmp_path / "other" / "checkpoints", str(folder.parent))
    start.set_aside()
    assert start.path == folder / "step-00000004.pt" and newest.exists()
    assert "falling back to an older checkpoint" in caplog.text


def test_a_newer_format_is_refused_and_not_moved(folder: Path) -> None:
    path = folder / "step-00000006.pt"
    torch.save({"step": 6, "format": 99}, path)
    with pytest.raises(ValueError, match="format version 99"):
        find_start(folder, "latest")
    assert verify(["verify", str(path)]) == 1


def test_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert find_start(folder, "latest").path is None
    path = checkpoint.save(folder, 7, {}, keep=1)
    for where in ("latest", str(path), str(folder), str(folder.parent)):
        assert find_start(folder, where).path == path
    for where in ("latst", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="give latest, none, or the path"):
            find_start(folder, where)
    assert verify(["verify", str(path), str(folder)]) == 0
    assert f"{path.name}  step        7" in capsys.readouterr().out
    assert verify(["verify", str(tmp_path / "nowhere")]) == 1
    assert "there is no checkpoint at" in capsys.readouterr().err
    assert verify(["verify"]) == 2 and verify(["list", str(folder)]) == 2
    assert verify(["--help"]) == 0


@pytest.mark.parametrize(
    "error", [KeyError("skipped"), TypeError("not a dict"), RuntimeError("Error(s):\n  size mismatch"), ValueError("x")]
)
def test_a_whole_checkpoint_that_does_not_fit_is_named_with_the_remedy(error: Exception) -> None:
    def restore() -> None:
        exec("raise error", {"error": error, "__name__": "torch.nn"})

    with pytest.raises(ValueError, match=r"step-00000006.pt does not fit this training .*; remove it to go on") as info:
        with restoring(Path("step-00000006.pt")):
            restore()
    assert info.value.__cause__ is error and "\n" not in str(info.value)
    with pytest.raises(type(error)), restoring(None):
        restore()


@pytest.mark.parametrize("said", ["DefaultCPUAllocator: can't allocate memory", "[gloo] Connection closed by peer"])
def test_an_error_that_is_not_the_files_passes(said: str) -> None:
    with pytest.raises(RuntimeError, match=said.split()[-1]), restoring(Path("step-00000006.pt")):
        raise RuntimeError(said)


def test_a_refusal_of_the_library_passes() -> None:
    with pytest.raises(DamagedCheckpoint), restoring(Path("step-00000006.pt")):
        checkpoint.load(__file__)
