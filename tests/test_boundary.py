"""Every failure of a command is one sentence on standard error, with an exit status."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast.atomic import write_atomic
from oner_fast.boundary import guarded
from oner_fast.data.carried import Failure, carried, opened
from oner_fast.data.sources.building import each
from oner_fast.data.workers import in_workers
from oner_fast.failures import keep_origin, origin, sentence
from oner_fast.remedies import install_extra_command
from oner_fast.train.config.serialization import from_dict


def raised(work: Any) -> Exception:
    """The exception that a call ends in."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def throws(error: Exception) -> Any:
    def throw() -> None:
        raise error

    return throw


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "larger than a file may be"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENOTDIR, "a folder is needed"),
        (errno.EEXIST, "a folder is needed"),
        (errno.EIO, "input/output error"),
        (errno.ELOOP, os.strerror(errno.ELOOP)),
    ],
)
def test_an_error_of_the_system_names_path_and_cause(number: int, words: str) -> None:
    said = sentence(raised(throws(OSError(number, os.strerror(number), "/runs/x/model"))))
    assert said.startswith("/runs/x/model: ") and words in said and "\n" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nframe #0"), "Tried to allocate 2 GiB)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), "data worker (pid 17) was killed"),
        (RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly"), "data worker (pid 17, 18) was killed"),
        (BrokenProcessPool("a child ended"), "a worker process was killed"),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"),
            "another rank ended",
        ),
        (torch.distributed.DistNetworkError("no answer"), "another rank ended"),
        (subprocess.CalledProcessError(3, ["npm", "pack"], stderr="a\nnot found\n"), "exit status 3: not found"),
        (ModuleNotFoundError("No module named 'timm.x'", name="timm.x"), install_extra_command("clip")),
    ],
)
def test_what_a_user_can_mend_is_named(error: Exception, words: str) -> None:
    said = sentence(raised(throws(error)), "train")
    assert words in said and "\n" not in said and "unexpected" not in said


def test_a_refusal_of_the_library_is_its_message_and_nothing_else() -> None:
    error = raised(lambda: from_dict(int, {}))
    assert origin(error).refused and sentence(error) == " ".join(str(error).split())


def test_a_bug_is_named_with_its_place_and_the_variable() -> None:
    error = raised(lambda: each.__wrapped__)
    said = sentence(error)
    assert said.startswith(f"unexpected AttributeError at {__file__}:") and "ONER_FAST_TRACEBACK=1" in said


def test_an_error_within_a_frame_of_the_library_is_no_refusal() -> None:
    """A TypeError of the interpreter in the library's own frame is a bug, not a message."""
    error = raised(lambda: list(each(len, None, 2)))  # type: ignore[arg-type]
    assert not origin(error).refused and "building.py:" in sentence(error)


def test_the_origin_travels_between_processes() -> None:
    error = raised(lambda: from_dict(int, {}))
    keep_origin(error)
    assert origin(pickle.loads(pickle.dumps(error))) == origin(error)


def test_the_boundary_prints_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert guarded("tool", lambda: None) == 0 and guarded("tool", lambda: 3) == 3
    assert guarded("tool", throws(OSError(errno.ENOSPC, "", "x"))) == 1
    assert capsys.readouterr().err == "tool: x: no space is left on the file system; free some\n"
    monkeypatch.setenv("ONER_FAST_TRACEBACK", "1")
    assert guarded("tool", throws(KeyError("x"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.splitlines()[-1].startswith("tool: unexpected KeyError at ")


def test_another_rank_names_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert guarded("tool", throws(OSError(errno.EIO, "", "x"))) == 1
    assert capsys.readouterr().err.startswith("tool, rank 1: x: ")


def test_ctrl_c_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert guarded("tool", interrupt, interrupted="all is kept") == 130
    assert capsys.readouterr().err == "tool: all is kept\n"


def test_ctrl_c_stays_one_where_a_library_fails_while_it_unwinds(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 422016 vs 421904")

    assert guarded("tool", interrupt, interrupted="all is kept") == 130
    assert capsys.readouterr().err == "tool: all is kept\n"


def test_a_character_that_the_output_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert guarded("tool", lambda: print("runs/ünï/model \udcff")) == 0
    assert raw.getvalue() == rb"runs/\xfcn\xef/model \udcff" + b"\n"


def test_output_that_nobody_reads_ends_quietly_and_a_full_disk_does_not() -> None:
    """`oner-fast doctor | head`, and `oner-fast --help` into /dev/full."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    command = "import sys; from oner_fast.boundary import guarded; sys.exit(guarded('tool', lambda: print('x' * 99)))"
    done = subprocess.run(
        [sys.executable, "-c", command], stdout=writer, stderr=subprocess.PIPE, check=False, env=environment
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", command], stdout=full, stderr=subprocess.PIPE, check=False, env=environment
        )
    assert (done.returncode, done.stderr) == (
        1,
        b"tool: standard output: no space is left on the file system; free some\n",
    )


def test_a_full_disk_survives_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save ends in "unexpected pos"; the system's own error, the path and the old file remain."""
    import resource

    path = tmp_path / "model.pt"
    path.write_bytes(b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        error = raised(lambda: write_atomic(path, lambda file: torch.save(torch.zeros(100_000), file)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(error, OSError) and (error.errno, error.filename) == (errno.EFBIG, str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt"] and path.read_bytes() == b"before"


class Source(torch.utils.data.Dataset[Any]):
    """Fails at its second batch."""

    def __getitem__(self, index: int) -> int:
        if index:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/x.tar")
        return 7


def test_a_data_worker_fails_with_the_error_that_it_met() -> None:
    batches = in_workers(Source(), [0, 1], 1, 2, False)
    assert next(batches) == 7
    error = raised(lambda: next(batches))
    assert isinstance(error, OSError) and sentence(error).startswith("/data/x.tar: input/output error")
    assert "In a data worker" in error.__notes__[0] and "__getitem__" in error.__notes__[0]


def test_an_exception_that_cannot_travel_becomes_one_that_can() -> None:
    class Local(Exception):
        pass

    class Unpicklable(torch.utils.data.Dataset[Any]):
        def __getitem__(self, index: int) -> int:
            raise Local("why")

    failure = carried(Unpicklable())[0]
    assert isinstance(failure, Failure)
    with pytest.raises(RuntimeError, match="Local: why"):
        opened(failure)


def test_a_builder_whose_worker_dies_ends() -> None:
    assert list(each(int, ["1", "2"], 2)) == [1, 2]
    assert "was killed" in sentence(raised(lambda: list(each(os._exit, [9, 9], 2))))
    assert isinstance(raised(lambda: list(each(int, ["1", "x"], 2))), ValueError)
