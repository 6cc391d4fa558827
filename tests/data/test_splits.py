"""The splits of a data set in every form, and a folder that cannot be listed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from oner_fast.data.dataset import PairDataset
from oner_fast.data.splits import exists, open_split, splits_of


def write(path: Path, count: int = 2) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            for name in (f"{number}.png", f"{number}.txt"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))


def test_splits_by_listing_by_names_and_without_names(tmp_path: Path) -> None:
    named, unnamed = tmp_path / "named", tmp_path / "unnamed"
    for folder, names in ((named, ("train-000.tar", "val-000.tar", "val-001.TAR")), (unnamed, ("00.tar", "01.tar"))):
        folder.mkdir()
        for name in names:
            write(folder / name)
    assert splits_of(str(named)) == ["train", "val"]
    assert splits_of(str(unnamed)) == ["train"] and splits_of(str(unnamed), "val") == ["val"]
    assert len(open_split(str(unnamed), "val")) == 4
    assert splits_of(str(unnamed / "*.tar"), "val") == ["val"]
    assert len(open_split(str(unnamed / "{00..01}.tar"), "val")) == 4
    (named / "dataset.json").write_text(json.dumps({"splits": {"a": {"shards": []}, "b": {"shards": []}}}))
    assert splits_of(str(named)) == ["a", "b"]
    for content in ("{", "[]", "{}", '{"splits": []}'):
        (named / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            splits_of(str(named))
    assert exists(str(named)) and exists("gone/*.tar") and not exists("gone")


def test_several_sources(tmp_path: Path) -> None:
    named, unnamed, tar = tmp_path / "named", tmp_path / "unnamed", tmp_path / "more.tar"
    for folder, names in ((named, ("train-000.tar", "val-000.tar")), (unnamed, ("00.tar", "01.TAR"))):
        folder.mkdir()
        for name in names:
            write(folder / name)
    write(tar, 3)
    every = f"{named}::{unnamed}::{tmp_path}/mor?.tar"
    assert splits_of(every) == ["train", "val"]
    assert len(open_split(every, "train", "train")) == 2 + 4 + 3
    assert len(open_split(every, "val", "train")) == 2
    assert len(open_split(every, "val", "val")) == 2 + 4 + 3
    assert len(open_split(f"{tar}::{tar}", "any")) == 6
    assert len(PairDataset(f"{named}::{tar}", "val")) == 5
    assert exists(every) and not exists(f"{every}::gone") and not exists("pipe:cat {0..3}.tar")
    with pytest.raises(ValueError, match="no source in .* has a split 'style'"):
        open_split(every, "style", "train")
    with pytest.raises(ValueError, match="nothing on one side of '::'"):
        splits_of(f"{named}::")
    odd = tmp_path / "a::b.tar"
    write(odd)
    assert len(open_split(str(odd), "val")) == 2


def test_a_folder_that_cannot_be_listed_is_no_folder_without_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train-000.tar")

    def broken(*_: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "listdir", broken)
    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(PermissionError):
        splits_of(str(tmp_path))
