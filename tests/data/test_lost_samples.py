"""Whole samples that damage took keep their numbers, so that no other slot moves: with no index cached, too."""

import io
import json
import tarfile

import numpy as np
import pytest

from oner_fast.data.dataset import CorruptSample, PairDataset
from oner_fast.data.sources.writer import Sample, split_record, write_json, write_shard
from oner_fast.data.tar_index import TarIndex, build_index, load_index


def words(i):
    return f"caption {i * 7919 % 1000}"


def key(i):
    return f"{i * 37 + i % 3:09d}"  # gaps, as in a table of which rows were left out


@pytest.fixture
def folder(tars, tmp_path):
    """A folder in the form of the builders, without an index."""
    samples = [Sample(key(i), tars.draw(i), "png", {"caption": words(i)}) for i in range(32)]
    shard = write_shard(tmp_path / "train-000000.tar", samples)
    write_json(tmp_path / "dataset.json", {"format": 1, "splits": {"train": split_record([shard], 32, 32)}})
    return tmp_path


def damage(tar, *parts):
    data = bytearray(tar.read_bytes())
    for start, length in parts:
        data[start : start + length] = bytes(length)
    tar.write_bytes(data)


def check(dataset, keys, untouched):
    """Every sample that can be read has its own key, and those untouched can be read."""
    assert len(dataset) == len(keys)
    for i, expected in enumerate(keys):
        try:
            pair = dataset.read(i)
        except CorruptSample:
            assert i not in untouched
        else:
            assert pair.key == expected
            assert i not in untouched or pair.caption == words(i)


def ranges(tar):
    """First and last byte of each sample."""
    ends = {}
    with tarfile.open(tar) as file:
        for member in file:
            first, _ = ends.get(member.name.split(".")[0], (member.offset, 0))
            ends[member.name.split(".")[0]] = (first, member.offset_data + -(-member.size // 512) * 512)
    return list(ends.values())


def outside(places, parts):
    return {
        i
        for i, (first, end) in enumerate(places)
        if all(end <= start or start + length <= first for start, length in parts)
    }


def test_4096_zeroed_bytes_anywhere_move_no_sample(folder):
    tar = folder / "train-000000.tar"
    whole, places = tar.read_bytes(), ranges(tar)
    lost = 0
    for start in range(0, places[-1][1], 1536):
        tar.write_bytes(whole)
        damage(tar, (start, 4096))
        TarIndex.file(tar).unlink(missing_ok=True)
        index = build_index(tar)
        lost += int((index.offsets < 0).all(axis=1).sum())
        check(PairDataset(folder), [key(i) for i in range(32)], outside(places, [(start, 4096)]))
    assert lost > 10


def test_several_damaged_parts_and_a_cut_end(folder):
    tar = folder / "train-000000.tar"
    places = ranges(tar)
    parts = [(places[k][0] - 512, 4096 + 512) for k in (0, 4, 11, 19)] + [(places[27][0] + 300, 1 << 20)]
    parts[0] = (0, 5000)
    damage(tar, *parts[:-1])
    tar.write_bytes(tar.read_bytes()[: places[27][0] + 300])
    dataset = PairDataset(folder)
    check(dataset, [key(i) for i in range(32)], outside(places, parts))
    assert any("of the 32 that its headers count; the lost ones keep their numbers" in one for one in dataset.damage)


def test_a_tar_alone_keeps_the_numbers_of_its_headers(folder):
    tar = folder / "train-000000.tar"
    places = ranges(tar)
    damage(tar, (places[5][0], places[9][0] - places[5][0]))
    check(PairDataset(tar), [key(i) for i in range(32)], outside(places, [(places[5][0], places[9][0] - places[5][0])]))


def foreign(tars, path, keys):
    """A tar of another writer."""
    members = []
    for i, name in enumerate(keys):
        members += [(f"{name}.png", tars.draw(i)), (f"{name}.txt", words(i).encode())]
    return tars.write(path, members)


def test_keys_that_count_tell_what_is_missing(tars, tmp_path):
    keys = [f"shard/00{i:07d}" for i in range(40, 60)]
    tar = foreign(tars, tmp_path / "a.tar", keys)
    places = ranges(tar)
    parts = [(places[5][0], places[8][0] - places[5][0]), (places[12][0], 512)]
    damage(tar, *parts)
    dataset = PairDataset(tar)
    check(dataset, keys, outside(places, parts))
    assert dataset.name(6) == "a.tar:shard/000000046"
    assert any("17 samples of the 20 that its keys count" in one for one in dataset.damage)


def test_the_count_of_dataset_json_fills_the_one_damaged_part(tars, tmp_path):
    keys = [f"photo-{i * i}" for i in range(20)]
    tar = foreign(tars, tmp_path / "train-0.tar", keys)
    listing = {"format": 1, "splits": {"train": {"shards": [{"file": tar.name, "samples": 20}]}}}
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    places = ranges(tar)
    part = (places[3][0], places[7][0] - places[3][0])
    damage(tar, part)
    dataset = PairDataset(tmp_path)
    check(dataset, keys, outside(places, [part]))
    assert dataset.name(4) == "train-0.tar:sample 4"
    with pytest.raises(CorruptSample, match="sample 4: it was lost with a damaged part of its tar"):
        dataset.read(4)


def test_an_earlier_index_keeps_the_numbers_of_any_tar(tars, tmp_path):
    keys = [f"photo-{i * i}" for i in range(20)]
    tar = foreign(tars, tmp_path / "a.tar", keys)
    load_index(tar)
    places = ranges(tar)
    parts = [(places[3][0], 2048), (places[10][0], places[13][0] - places[10][0]), (places[18][0], 1 << 20)]
    damage(tar, *parts[:-1])
    tar.write_bytes(tar.read_bytes()[: places[18][0]])
    for _ in range(2):  # the second time from the index that was saved then
        dataset = PairDataset(tar)
        check(dataset, keys, outside(places, parts))
        assert [dataset.name(i) for i in (11, 19)] == ["a.tar:photo-121", "a.tar:photo-361"]


def test_another_tar_does_not_take_the_earlier_numbers(tars, tmp_path):
    tar = foreign(tars, tmp_path / "a.tar", [f"photo-{i}" for i in range(9)])
    load_index(tar)
    foreign(tars, tar, [f"drawing-{i * i}" for i in range(5)])
    places = ranges(tar)
    damage(tar, (places[2][0], 512))
    assert load_index(tar).keys == [f"drawing-{i * i}" for i in range(5)]


def test_without_any_record_the_doubt_is_said(tars, tmp_path):
    tar = foreign(tars, tmp_path / "a.tar", [f"photo-{i * i}" for i in range(9)])
    places = ranges(tar)
    damage(tar, (places[2][0], places[4][0] - places[2][0]))
    index = build_index(tar)
    assert len(index) == 7
    assert any("no record says how many samples a damaged part held" in one for one in index.damage)


def test_a_shard_that_is_no_tar_any_more_keeps_its_slots(folder):
    tar = folder / "train-000000.tar"
    for content, why in (
        (b"", "is empty"),
        (b"<html>not found</html>", "is an HTML page"),
        (b"\1" * 9000, "is not a tar"),
    ):
        tar.write_bytes(content)
        dataset = PairDataset(folder)
        assert len(dataset) == 32 and any(why in one for one in dataset.damage)
        with pytest.raises(CorruptSample, match="it was lost"):
            dataset.read(31)


def test_a_number_in_a_header_beyond_the_tar_is_ignored(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.png", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = 1, 1 << 32, "oner_fast"
            tar.addfile(info, io.BytesIO(b"x"))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:2048] + b"\1" * 1024)
    index = build_index(tmp_path / "a.tar")
    assert index.keys == ["a"]


def test_an_impossible_number_of_samples_is_refused(tars, tmp_path):
    tar = foreign(tars, tmp_path / "train-0.tar", ["a"])
    listing = {"splits": {"train": {"shards": [{"file": tar.name, "samples": 10**15}]}}}
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"dataset.json lists 1,000,000,000,000,000 samples in train-0.tar"):
        PairDataset(tmp_path)


def test_ten_thousand_damaged_headers_take_linear_time(tars, tmp_path):
    tar = foreign(tars, tmp_path / "a.tar", [f"{i:06d}" for i in range(3000)])
    data = np.frombuffer(tar.read_bytes(), np.uint8).copy()
    for first, _ in ranges(tar)[::2]:
        data[first] ^= 1
    tar.write_bytes(data.tobytes())
    index = build_index(tar, 3000)
    assert len(index) == 3000 and index.keys[1001] == "001001"
    assert any("more damaged places" in one for one in index.damage) and len(index.damage) < 2100
