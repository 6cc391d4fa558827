"""A run's folder has one writer, and its lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oner_fast.train.engine.run_lock import FILE, RunInUse, lost, run_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from oner_fast.train.engine.run_lock import run_lock

with run_lock(Path(sys.argv[1])):
    child = os.fork()  # as a loader's worker
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_the_second_says_who_holds_it_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    with run_lock(run):
        about = json.loads((run / FILE).read_text())
        assert about["pid"] == os.getpid() and about["command"] and about["since"]
        with pytest.raises(RunInUse, match=rf"mine is in use by process {os.getpid()} on .*; stop that training"):
            with run_lock(run):
                raise AssertionError("two writers")
        assert json.loads((run / FILE).read_text()) == about
    assert list(tmp_path.iterdir()) == []
    with run_lock(run):
        (run / "model").write_text("x")
    assert [path.name for path in run.iterdir()] == ["model"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"{}", b"x" * 100_000])
def test_a_record_that_cannot_be_read_still_refuses(tmp_path: Path, content: bytes) -> None:
    with run_lock(tmp_path):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(RunInUse, match="is in use by"), run_lock(tmp_path):
            raise AssertionError("two writers")


def test_a_killed_holder_leaves_no_lock_even_while_its_child_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunInUse, match=f"process {holder.pid} on"), run_lock(tmp_path):
            raise AssertionError("two writers")
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        with run_lock(tmp_path):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_warning_says_so(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / FILE).write_text(json.dumps({"pid": 7, "host": "there", "since": "then", "command": "train"}))
    with run_lock(tmp_path):
        pass
    assert "has no locks" in caplog.text and "names process 7 on there" in caplog.text


def test_another_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), run_lock(tmp_path / "run"):
        raise AssertionError("no lock")


def test_a_lock_file_that_was_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = fcntl.flock, []

    def removed_first(descriptor: int, flags: int) -> None:
        calls.append(flags)
        if len(calls) == 1:
            (tmp_path / FILE).unlink()  # the holder before has just ended
        lock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with run_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunInUse), run_lock(tmp_path):
            raise AssertionError("two writers")


def test_a_folder_that_was_moved_is_lost_and_the_one_in_its_place_is_left_alone(tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    with run_lock(run):
        assert not lost(run)
        run.rename(moved)
        assert lost(run)
        run.mkdir()
        assert lost(run)
        (run / FILE).write_text("another training's")
        assert lost(run)
    assert (run / FILE).read_text() == "another training's" and not lost(run)


def test_a_lock_file_that_was_removed_by_hand_loses_no_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / FILE).unlink()
        assert not lost(tmp_path)


def test_a_link_to_no_folder_is_named_with_its_target(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "unmounted")
    for folder in (tmp_path / "run", tmp_path / "run" / "inner"):
        with pytest.raises(FileNotFoundError, match="run is a symbolic link to .*unmounted, which does not exist"):
            with run_lock(folder):
                raise AssertionError("locked")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_file_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with run_lock(tmp_path):
        monkeypatch.setattr(os, "unlink", broken)
    assert f"{tmp_path / FILE} cannot be removed" in caplog.text
    monkeypatch.undo()
    with run_lock(tmp_path):
        pass
    assert not (tmp_path / FILE).exists()
