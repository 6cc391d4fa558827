import json
from pathlib import Path

import pytest

pytest.importorskip("webdataset", reason="needs the train extra")
pytest.importorskip("rich", reason="needs the train extra")

from oner_fast.data.sources.building import Build, each, index_tars
from oner_fast.data.sources.writer import Sample, measure, replacing, split_record, write_shard
from oner_fast.data.tar_index import load_index


def sample(key: str) -> Sample:
    return Sample(key, b"picture " + key.encode(), "png", {"caption": f"caption {key}"})


def test_shard_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.tar", (sample(key) for key in "xyz"))
    second = write_shard(tmp_path / "b.tar", [sample(key) for key in "xyz"])
    assert (first.sha256, first.bytes, first.samples) == (second.sha256, second.bytes, 3)
    assert measure(tmp_path / "a.tar", 3) == first
    assert write_shard(tmp_path / "c.tar", [sample("x")]).sha256 != first.sha256


def test_replacing_keeps_the_old_file_when_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def finished(folder: Path, options: dict[str, int]) -> Build:
    build = Build(folder, "test", options)
    build.begin()
    shard = write_shard(folder / "train-000000.tar", [sample("x")])
    build.finish({"splits": {"train": split_record([shard], 1, 1)}})
    return build


def test_a_finished_folder_is_recognised_and_another_build_refused(tmp_path: Path) -> None:
    finished(tmp_path, {"image_size": 64})
    assert Build(tmp_path, "test", {"image_size": 64}).finished
    with pytest.raises(ValueError, match=r"image_size 64 there, 48 asked for.*--overwrite"):
        Build(tmp_path, "test", {"image_size": 48})
    with pytest.raises(ValueError, match="of test, not of other"):
        Build(tmp_path, "other", {"image_size": 64})


def test_overwrite_removes_the_build_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path, {"image_size": 64})
    (tmp_path / "notes.txt").write_text("mine")
    assert not Build(tmp_path, "test", {"image_size": 48}, overwrite=True).finished
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_or_truncated_shard_makes_the_folder_unfinished(tmp_path: Path) -> None:
    shard = tmp_path / "train-000000.tar"
    finished(tmp_path, {})
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    build = Build(tmp_path, "test", {})
    assert not build.finished
    build.begin()
    assert not shard.exists()
    shard.write_bytes(data)
    assert Build(tmp_path, "test", {}).finished


def test_tars_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", [sample("x")])
    with pytest.raises(ValueError, match="tars without a dataset.json"):
        Build(tmp_path, "test", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Build(tmp_path / "file", "test", {})


def test_finish_drops_stale_shards(tmp_path: Path) -> None:
    build = Build(tmp_path, "test", {})
    build.begin()
    write_shard(tmp_path / "val-000007.tar", [sample("y")])
    shard = write_shard(tmp_path / "train-000000.tar", [sample("x")])
    build.finish({"splits": {"train": split_record([shard], 1, 1)}})
    assert {path.name for path in tmp_path.glob("*.tar")} == {"train-000000.tar"}
    assert load_index(tmp_path / "train-000000.tar").keys == ["x"]
    assert json.loads((tmp_path / "dataset.json").read_text())["splits"]["train"]["samples"] == 1


def test_each_keeps_order_for_any_workers() -> None:
    assert list(each(abs, [-3, 2, -1], 1)) == list(each(abs, [-3, 2, -1], 2)) == [3, 2, 1]
    with pytest.raises(ValueError, match="workers is 0"):
        list(each(abs, [1, 2], 0))


def test_index_tars_takes_files_and_folders(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [sample("x"), sample("y")])
    write_shard(tmp_path / "b.tar", [sample("z")])
    index_tars([tmp_path])
    assert (tmp_path / "a.tar.index.npz").exists() and (tmp_path / "b.tar.index.npz").exists()
    with pytest.raises(ValueError, match="no such file.*absent.tar"):
        index_tars([tmp_path / "absent.tar"])
    with pytest.raises(ValueError, match="no tar to index"):
        index_tars([])
