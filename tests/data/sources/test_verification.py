"""`oner-fast data verify` finds every kind of damage, names it and exits with 1; training checks sums when asked."""

import os
from pathlib import Path

import pytest

pytest.importorskip("webdataset", reason="needs the train extra")
pytest.importorskip("rich", reason="needs the train extra")

from oner_fast.data.checksums import check_shards
from oner_fast.data.sources.cli import main
from oner_fast.data.sources.verification import verify_data
from oner_fast.data.sources.writer import Sample, Shard, split_record, write_json, write_shard
from oner_fast.data.tar_index import TarIndex, build_index


@pytest.fixture
def folder(tars, tmp_path):
    """A dataset of two shards of 300 and 20 samples, as a builder leaves it."""
    shards: list[Shard] = []
    for k, count in enumerate((300, 20)):
        samples = [
            Sample(f"{k}{i:08d}", tars.draw(i % 50, side=8), "png", {"caption": f"a {i}", "tags": []})
            for i in range(count)
        ]
        shards.append(write_shard(tmp_path / f"train-{k:06d}.tar", samples))
        build_index(tmp_path / shards[-1].file).save()
    write_json(tmp_path / "dataset.json", {"format": 1, "splits": {"train": split_record(shards, 320, 320)}})
    return tmp_path


def write_at(path: Path, place: int, data: bytes, keep_time: bool = True) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_whole_dataset_passes_and_nothing_is_written(folder, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["verify", str(folder), "--workers", "2"]) == 0
    said = capsys.readouterr().err
    assert "320 samples: 320 images, 320 captions and 320 metadata can be read; 2 checksums are right" in said
    assert "checking sums and headers: 2 of 2" in said and "decoding samples: 320 of 320" in said
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_flipped_byte_of_an_image_is_found_and_named(folder, tmp_path, capsys):
    tar = folder / "train-000001.tar"
    index = build_index(tar)
    write_at(tar, int(index.offsets[7, 0]) + 20, b"\xff\xff\xff\xff")
    assert main(["verify", str(folder), "--workers", "1", "--damage-list", str(tmp_path / "list.txt")]) == 1
    said = capsys.readouterr().err
    assert "319 images, 320 captions" in said and "1 checksums are right" in said
    first, second = (tmp_path / "list.txt").read_text().splitlines()
    assert first.startswith("train-000001.tar: its sha256 is ") and first.endswith(" was recorded")
    assert second.startswith("train-000001.tar:100000007: not a readable image")
    assert f"oner-fast data: 2 damaged places in {folder}" in said


@pytest.mark.parametrize(
    "kind, data, why",
    [
        (2, b"", ""),
        (1, b"\xff", "its caption is not UTF-8"),
        (2, b"[", "its JSON cannot be read"),
        (1, b"   ", "empty"),
    ],
)
def test_captions_and_metadata_are_read(tars, tmp_path, kind, data, why):
    names = {1: "000000000.txt", 2: "000000000.json"}
    members = [(name, data if name == names[kind] and why else content) for name, content in tars.pair(0)]
    tar = tars.write(tmp_path / "a.tar", members)
    found = verify_data([tar], workers=1)
    assert (found.samples, found.images) == (1, 1)
    assert [why in one for one in found.damage] == ([True] if why else [])


def test_lost_samples_a_cut_tar_and_an_index_of_another_tar(folder):
    tar = folder / "train-000001.tar"
    index = build_index(tar)
    write_at(tar, int(index.offsets[3, 2]) - 512, bytes(4096))
    found = verify_data([folder], workers=1)
    assert found.samples == 320 and any("its earlier index had" in one for one in found.damage)
    os.truncate(tar, 5000)
    assert any("it has 5,000 bytes, and " in one for one in verify_data([folder], workers=1).damage)
    other = TarIndex.file(folder / "train-000000.tar")
    other.write_bytes(TarIndex.file(tar).read_bytes())
    tar.unlink()
    damage = verify_data([folder], workers=1).damage
    assert "train-000001.tar: cannot be read (No such file or directory)" in damage


def test_an_index_that_does_not_fit_its_tar_is_named(folder):
    tar = folder / "train-000000.tar"
    index = build_index(tar)
    index.offsets, index.sizes, index.checksums = (one.copy() for one in (index.offsets, index.sizes, index.checksums))
    for table in (index.offsets, index.sizes, index.checksums):
        table[[100, 101]] = table[[101, 100]]
    index.save()
    (damage,) = verify_data([folder], workers=1).damage
    assert damage == "train-000000.tar: train-000000.tar.index.npz is not its index; remove that file"


def test_images_alone_and_left_out_members(tars, tmp_path, capsys):
    members = [(f"{i}.png", tars.draw(i)) for i in range(3)]
    assert verify_data([tars.write(tmp_path / "a.tar", members)], workers=1).damage == []
    tars.write(tmp_path / "a.tar", [*members, ("README", b"x"), ("photo.v2.png", b"x")])
    assert main(["verify", str(tmp_path / "a.tar")]) == 1
    said = capsys.readouterr().err
    assert "left out by rule: a.tar: 1 member is not taken (no extension): 'README'" in said
    assert "damaged: a.tar: 1 member is not taken (a key ends at the first dot" in said


def test_what_is_no_data_is_refused_or_named(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "no tar to verify" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "none.tar")]) == 1
    assert "none.tar: cannot be read (No such file" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b\x08")
    assert main(["verify", str(tmp_path / "a.tar")]) == 1
    assert "gzip -d a.tar.gz" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 1
    assert "dataset.json lists no splits" in capsys.readouterr().err


def test_training_checks_the_recorded_sums(folder):
    assert [shard.path.name for shard in check_shards(folder, "train")] == ["train-000000.tar", "train-000001.tar"]
    assert [shard.path.name for shard in check_shards(folder, "train", 1, 2)] == ["train-000001.tar"]
    tar = folder / "train-000001.tar"
    write_at(tar, 600, b"x")
    with pytest.raises(ValueError, match="train-000001.tar is not the file that was built: its sha256 is"):
        list(check_shards(folder, "train"))
    with pytest.raises(ValueError, match="no checksums of split 'val' are recorded"):
        list(check_shards(folder, "val"))
    with pytest.raises(ValueError, match="no checksums of split 'train' are recorded in .*`oner-fast data verify`"):
        list(check_shards(tar, "train"))
