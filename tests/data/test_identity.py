"""Tars that two data sets share: the same file, links, copies; and tars that only look alike."""

import io
import os
import tarfile
from pathlib import Path

from oner_fast.data.dataset import PairDataset
from oner_fast.data.identity import shared_tars


def write(path: Path, content: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shared_tars(tmp_path: Path) -> None:
    tar, twin = write(tmp_path / "a.tar", b"abc"), write(tmp_path / "twin.tar", b"xyz")
    link, hard, copy = tmp_path / "link.tar", tmp_path / "hard.tar", tmp_path / "copy.tar"
    link.symlink_to(tar)
    os.link(tar, hard)
    copy.write_bytes(tar.read_bytes())
    longer = write(tmp_path / "longer.tar", b"abcd")
    every = PairDataset([tar, twin, link, hard, copy, longer])
    found = {one.path.name: (one.other.name, one.how) for one in shared_tars(every.indexes, PairDataset(tar).indexes)}
    assert found == {
        "a.tar": ("a.tar", "the same file"),
        "link.tar": ("a.tar", "the same file under another name"),
        "hard.tar": ("a.tar", "the same file under another name"),
        "copy.tar": ("a.tar", "a copy with the same bytes"),
    }  # the twin has the same headers and other bytes
    assert not shared_tars(PairDataset(twin).indexes, PairDataset(tar).indexes)
