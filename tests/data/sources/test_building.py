import fcntl
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("webdataset", reason="needs the train extra")
pytest.importorskip("rich", reason="needs the train extra")

from oner_fast.atomic import replacing
from oner_fast.data.sources.building import Build, each, index_tars
from oner_fast.data.sources.writer import Sample, measure, split_record, write_shard
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


HOSTILE = ["../victim.txt", "/ABSOLUTE/victim.txt", "sub/train-000000.tar", "..", "", ".", "victim.txt", 7, None]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_listing_of_foreign_files_removes_none(name: object, overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    finished(folder, {})
    victims = [tmp_path / "victim.txt", folder / "victim.txt", folder / "sub" / "train-000000.tar"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("mine")
    listing = json.loads((folder / "dataset.json").read_text())
    listed = name.replace("/ABSOLUTE", str(tmp_path)) if isinstance(name, str) else name
    listing["splits"]["train"]["shards"].append({"file": listed, "samples": 1, "bytes": 1, "sha256": ""})
    (folder / "dataset.json").write_text(json.dumps(listing))
    if overwrite:
        assert not Build(folder, "test", {}, overwrite=True).finished
        assert not (folder / "train-000000.tar").exists()
    else:
        with pytest.raises(ValueError, match=r"dataset.json lists the shard .*, which no build of oner_fast writes"):
            Build(folder, "test", {}).begin()
    assert [victim.read_text() for victim in victims] == ["mine"] * 3


@pytest.mark.parametrize(
    "text", ["{}", '{"splits": 7}', '{"splits": {"train": {"shards": [1]}}}', "[" * 10_000, "\0", ""]
)
def test_a_damaged_listing_is_refused_in_a_sentence_and_can_be_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="holds another build.*--overwrite"):
        Build(tmp_path, "test", {})
    assert not Build(tmp_path, "test", {}, overwrite=True).finished
    damaged = json.dumps({"build": {"source": "test"}, "splits": {"train": {}}})
    (tmp_path / "dataset.json").write_text(damaged)
    with pytest.raises(ValueError, match="dataset.json lists no shards of a build .*--overwrite"):
        Build(tmp_path, "test", {})
    assert not Build(tmp_path, "test", {}, overwrite=True).finished


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("victim.tar", ".part-00001.7.tmp", "options.json"):
        (outside / name).write_text("mine")
    folder = tmp_path / "data"
    finished(folder, {})
    (folder / "train-000000.tar").unlink()
    (folder / "train-000000.tar").symlink_to(outside / "victim.tar")
    (folder / ".build").symlink_to(outside)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"data/.build is a symbolic link.*remove it"):
            Build(folder, "test", {}, overwrite=overwrite)
    (folder / ".build").unlink()
    build = Build(folder, "test", {})
    assert not build.finished
    build.begin()
    assert not (folder / "train-000000.tar").is_symlink()
    assert sorted(path.read_text() for path in outside.iterdir()) == ["mine"] * 3


def test_only_files_of_a_build_are_removed_from_its_working_folder(tmp_path: Path) -> None:
    build = Build(tmp_path, "test", {})
    build.begin()
    work = tmp_path / ".build"
    ours = ("part-00003", ".part-00004.12.tmp", "train-000001.tar.json", "val-000000.tar.json")
    for name in (*ours, "notes.txt", ".cache.tmp"):
        (work / name).write_text("")
    (work / "nested").mkdir()
    (work / "nested" / "part-00001").write_text("mine")
    (tmp_path / "train-000009.tar").mkdir()
    build.begin()
    assert not (work / ".part-00004.12.tmp").exists() and (work / "part-00003").exists()
    build.abandon()
    assert sorted(path.name for path in work.iterdir()) == [".cache.tmp", "nested", "notes.txt"]
    assert (work / "nested" / "part-00001").read_text() == "mine" and (tmp_path / "train-000009.tar").is_dir()


def test_a_file_in_the_place_of_the_working_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".build").write_text("mine")
    with pytest.raises(ValueError, match="a build keeps its working files there"):
        Build(tmp_path, "test", {})


def test_a_record_of_a_foreign_shard_is_not_finished(tmp_path: Path) -> None:
    build = Build(tmp_path / "data", "test", {})
    build.begin()
    victim = write_shard(tmp_path / "victim.tar", [sample("x")])
    record = split_record([victim], 1, 1)
    record["shards"][0]["file"] = "../victim.tar"
    with pytest.raises(ValueError, match="the build lists the shard '../victim.tar'"):
        build.finish({"splits": {"train": record}})
    assert [path.name for path in tmp_path.glob("victim*")] == ["victim.tar"]


def test_what_was_left_out_is_written_and_belongs_to_the_build(tmp_path: Path) -> None:
    build = Build(tmp_path, "test", {})
    build.write_left_out(["a row", "caf\udce9"])
    assert (tmp_path / "left-out.txt").read_text() == "a row\ncaf\\udce9\n"
    build.write_left_out([])
    assert not (tmp_path / "left-out.txt").exists()


def test_one_process_at_a_time_builds_in_a_folder(tmp_path: Path) -> None:
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another process builds in .*; wait until it ends"):
            Build(tmp_path, "test", {}, overwrite)
    os.close(other)
    Build(tmp_path, "test", {}).begin()
    build = Build(tmp_path, "test", {})  # this process goes on with its own build
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    build.begin()
    build.finish({"splits": {}})
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_pipe_for_a_listing_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match="is not a file"):
        Build(tmp_path, "test", {})
