import json
import logging
import multiprocessing
import os
import pickle

import pytest

from oner_fast.data.dataset import CorruptSample, PairDataset


def test_a_folder_reads_in_order(tars, tmp_path):
    dataset = PairDataset(tars.folder(tmp_path / "d", samples=25, shards=3))
    assert len(dataset) == 25 and dataset.damage == []
    for i in range(25):
        pair = dataset.read(i)
        assert (pair.key, pair.caption, pair.image) == (f"{i:09d}", tars.caption(i), tars.draw(i))
        assert pair.meta["concept"] == str(i)
    assert list(dataset.captions()) == [tars.caption(i) for i in range(25)]
    assert dataset.read(3, meta=False).meta == {}
    assert dataset.name(24) == "train-000002.tar:000000024"
    for i in (-1, 25):
        with pytest.raises(IndexError, match="not in a dataset of 25"):
            dataset.read(i)


def test_img2dataset_layout(tars, tmp_path):
    tars.write(tmp_path / "00000.tar", tars.pairs(range(3), "jpg"))
    tars.write(tmp_path / "00001.tar", tars.pairs(range(10000, 10003), "jpg"))
    (tmp_path / "00000.parquet").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    dataset = PairDataset(tmp_path)
    assert [dataset.read(i).key for i in range(6)] == [f"{i:09d}" for i in (0, 1, 2, 10000, 10001, 10002)]
    assert dataset.read(4).image == tars.draw(10001, kind="JPEG")
    for path in (f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00001}}.tar", sorted(tmp_path.glob("*.tar"))):
        assert [PairDataset(path).read(i).key for i in range(6)] == [dataset.read(i).key for i in range(6)]
    assert len(PairDataset(tmp_path / "00001.tar")) == 3


def test_splits(tars, tmp_path):
    folder = tars.folder(tmp_path / "d", samples=10, listed=False)
    tars.write(folder / "val-000000.tar", tars.pairs(range(100, 104)))
    assert len(PairDataset(folder)) == 10
    assert [PairDataset(folder, "val").read(i).key for i in range(4)] == [f"{i:09d}" for i in range(100, 104)]
    with pytest.raises(ValueError, match="no tar of split 'test' .* splits found: train, val"):
        PairDataset(folder, "test")
    listed = tars.folder(tmp_path / "e", samples=10)
    with pytest.raises(ValueError, match="unknown split 'val' .* it has train"):
        PairDataset(listed, "val")


def test_missing_data_are_named(tars, tmp_path):
    with pytest.raises(ValueError, match="no dataset at .*nowhere"):
        PairDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 tars found"):
        PairDataset(tmp_path)
    folder = tars.folder(tmp_path / "d")
    (folder / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match="lacks train-000001.tar"):
        PairDataset(folder)
    with pytest.raises(ValueError, match="no samples"):
        PairDataset(tars.write(tmp_path / "empty.tar", [("README.md", b"x")]))


@pytest.mark.parametrize(
    "members, why",
    [
        ([("k.png", b"x")], "it has no caption"),
        ([("k.png", b"x"), ("k.json", b'{"caption": null}')], "it has no caption"),
        ([("k.png", b"x"), ("k.txt", b" \n")], "its caption is empty"),
        ([("k.png", b"x"), ("k.txt", b"\xff\xfe")], "not UTF-8"),
        ([("k.txt", b"x")], "no image"),
        ([("k.png", b"x"), ("k.txt", b"x"), ("k.json", b"{")], "its JSON cannot be read"),
        ([("k.png", b"x"), ("k.txt", b"x"), ("k.json", b"[1]")], "its JSON is a list"),
    ],
)
def test_unreadable_samples_are_named(tars, tmp_path, members, why):
    dataset = PairDataset(tars.write(tmp_path / "a.tar", [*tars.pair(0), *members]))
    assert dataset.read(0).caption == tars.caption(0)
    with pytest.raises(CorruptSample, match=f"a.tar:k: .*{why}"):
        dataset.read(1)


def test_a_caption_may_be_in_the_json(tars, tmp_path):
    members = [("k.png", b"x"), ("k.json", json.dumps({"caption": " ein Haus "}).encode())]
    dataset = PairDataset(tars.write(tmp_path / "a.tar", members))
    assert dataset.read(0).caption == dataset.read(0, meta=False).caption == dataset.caption(0) == "ein Haus"


def test_damage_does_not_renumber_other_samples(tars, tmp_path, caplog):
    folder = tars.folder(tmp_path / "d", samples=30, shards=3)
    middle = folder / "train-000001.tar"
    data = bytearray(middle.read_bytes())
    header = data.index(b"000000012.png")
    data[header + 5] ^= 1
    middle.write_bytes(data[: data.index(b"000000017.txt")])
    with caplog.at_level(logging.WARNING, "oner_fast.data"):
        dataset = PairDataset(folder)
    assert len(dataset) == 30
    readable = []
    for i in range(30):
        try:
            pair = dataset.read(i)
        except CorruptSample as error:
            assert error.name.startswith("train-000001.tar:")
        else:
            assert pair.image == tars.draw(i) and pair.caption == tars.caption(i)
            readable.append(i)
    assert readable == [i for i in range(30) if i not in (12, 17, 18, 19)]
    assert len(caplog.records) == len(dataset.damage) == 5
    for said in ("header is damaged", "after key '000000011'", "cut off", "8 samples of the 10"):
        assert any(said in record.getMessage() for record in caplog.records)
    assert len(list(dataset.captions())) == 27  # the caption of 12 is whole


def test_a_tar_cut_off_after_it_was_opened(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.pairs(range(3)))
    dataset = PairDataset(path)
    os.truncate(path, 1500)
    with pytest.raises(CorruptSample, match="cut off: 0 of"):
        dataset.read(2)


def test_files_are_opened_at_first_read_and_again_in_a_copy(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("oner_fast.data.dataset._OPEN_FILES", 2)
    dataset = PairDataset(tars.folder(tmp_path / "d", samples=20, shards=5))
    assert not dataset._files
    for i in [*range(20), 0, 19, 7]:
        assert dataset.read(i).image == tars.draw(i)
        assert len(dataset._files) <= 2
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._files and copy.read(5) == dataset.read(5)
    dataset.close()
    assert dataset.read(5) == copy.read(5)


def test_processes_do_not_share_a_file_position(tars, tmp_path):
    dataset = PairDataset(tars.folder(tmp_path / "d", samples=20))
    dataset.read(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(dataset.read, range(20)) == [dataset.read(i) for i in range(20)]
