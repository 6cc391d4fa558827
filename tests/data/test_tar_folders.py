"""Every file of a folder that is called like a tar is read or named; nothing waits for a pipe."""

import json
import logging
import os
from pathlib import Path

import pytest

from oner_fast.data.dataset import CorruptSample, PairDataset, caption_of
from oner_fast.data.sources.building import index_tars
from oner_fast.data.sources.verification import verify_data
from oner_fast.data.sources.writer import Sample, write_shard
from oner_fast.data.tar_folders import tars_in
from oner_fast.data.tar_index import build_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.TAR"):
        write_shard(tmp_path / name, [Sample("a", b"", "png", {"caption": name})])
    for name in ("00002.tar.gz", "00003.TGZ", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.tar").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    return tmp_path


NAMED = [
    "2 compressed tars are not read, such as 00002.tar.gz; decompress it first",
    "gone.tar: a broken link, not a tar",
]
NAMED += ["pipe.tar: a device or pipe, not a tar", "sub.tar: a folder, not a tar"]


def test_tars_are_taken_and_others_named(folder: Path, caplog: pytest.LogCaptureFixture, capsys) -> None:
    found = tars_in(folder)
    assert [tar.name for tar in found.tars] == ["00000.tar", "00001.TAR"]
    assert found.left_out() == NAMED
    with caplog.at_level(logging.WARNING):
        assert len(PairDataset(folder)) == 2
    index_tars([folder])
    said = capsys.readouterr().err
    verified = verify_data([folder], 1)
    for sentence in NAMED:
        assert sentence in caplog.text and sentence in said and sentence in verified.skipped


def test_tars_that_are_not_listed_or_of_no_split_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "00000.tar").rename(folder / "train-000000.tar")
    with caplog.at_level(logging.WARNING):
        assert len(PairDataset(folder)) == 1
    assert "1 tars named by no split, such as 00001.TAR" in caplog.text
    shards = [{"file": "train-000000.tar", "samples": 1}]
    (folder / "dataset.json").write_text(json.dumps({"format": 1, "splits": {"train": {"shards": shards}}}))
    with caplog.at_level(logging.WARNING):
        assert len(PairDataset(folder)) == 1
    unlisted = f"a tar is not read, since {folder / 'dataset.json'} does not list it, such as 00001.TAR"
    assert unlisted in caplog.text
    assert unlisted in verify_data([folder], 1).skipped


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"pipe\.tar is a pipe"):
        build_index(folder / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar is a pipe"):
        PairDataset(folder / "pipe.tar")
    assert "is a pipe" in verify_data([folder / "pipe.tar"], 1).damage[0]


def test_zeroed_captions_are_corrupt() -> None:
    for text, fields in ((b"\0\0\0", {}), ("a cat".encode("utf-16-le"), {}), (None, {"caption": "a\0cat"})):
        with pytest.raises(CorruptSample, match="its caption holds a NUL byte"):
            caption_of("a", text, fields)
