import os
import signal
import subprocess
import sys

import pytest

from oner_fast.atomic import remove_leftovers, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_only_files_of_dead_writers_are_removed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from oner_fast.atomic import write_atomic\n"
        "def slow(file):\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)\n"
        "write_atomic(Path(sys.argv[1]) / 'a.bin', slow)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
        assert remove_leftovers(tmp_path) == []
        assert len(os.listdir(tmp_path)) == 1
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    removed = remove_leftovers(tmp_path)
    assert len(removed) == 1 and removed[0].name.startswith(".a.bin.")
    assert os.listdir(tmp_path) == []
